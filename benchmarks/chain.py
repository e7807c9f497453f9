"""How clips of a long walk are best chained: the jump at their seams, for each of `fvgen.walks.chain.SEAMS`.

    python benchmarks/chain.py [--scenes 8] [--clips 4] [--overlap 2 3 4] [--steps 4] [--model tiny] [--out FILE.json]

What is measured, on built-in test rooms of which the first view is given, so that every seam is a generated view: how
much more the change from frame to frame differs from the true change where clips meet than inside them (grey levels of
255; 0 is no seam), and the PSNR of all generated frames. Same rooms and seeds for all; a difference to the first has
its 95 % interval over rooms. The last line is JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fvgen.clips.builtin import DATA_SEED
from fvgen.clips.rooms import drawn_scene, render_scene
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import write_json
from fvgen.walks.chain import SEAMS, chain, walk_spans
from fvgen.walks.paths import Walk
from fvgen.walks.render import Cloud, Rendered, render_walk
from fvgen.walks.run import load_walker


def room(index: int, frames: int, size: tuple[int, int], given: Sequence[int] = (0,)) -> tuple[Tensor, Cloud, Walk]:
    """True frames [F, 3, H, W], the cloud of those that are given, the path."""
    scene, cameras, _ = drawn_scene("test", DATA_SEED, index, frames, *size)
    truth, depth = render_scene(scene, cameras)
    views = list(given)
    cloud = Cloud(views, truth[views], cameras[views], depth[views], "depth", 0.0)
    return truth, cloud, Walk(cameras, {view: view for view in views})


def one(
    pipeline: NovelViewPipeline, index: int, clips: int, steps: int, seams: str, overlap: int
) -> tuple[float, float, int]:
    """(excess at the seams in grey levels, PSNR, clips) of one walk."""
    clip = pipeline.frames
    truth, cloud, walk = room(index, clips * (clip - 1) + 1, pipeline.frame_size)
    rendered = render_walk(cloud, walk)

    def again(extra: tuple[Tensor, Tensor]) -> Rendered:
        return render_walk(cloud, walk, extra=extra)

    video = chain(pipeline, rendered, clip, steps, index, seams, overlap, again)
    made = walk_spans(rendered.known, clip, seams, overlap)
    shared = overlap if seams == "overlap" else 1
    # Where the picture changes hands: after the shared end frame, or all along the fade.
    at = torch.zeros(len(truth) - 1, dtype=torch.bool)
    for span in made[1:]:
        at[span.start : span.start + shared] = True
    wrong = (video.diff(dim=0) - truth.diff(dim=0)).abs().mean((1, 2, 3)) * 255
    error = (video[1:] - truth[1:]).square().mean().item()
    return (wrong[at].mean() - wrong[~at].mean()).item(), -10 * math.log10(error), len(made)


def interval(values: list[float]) -> list[float]:
    """[mean, half of the 95 % interval]."""
    x = torch.tensor(values, dtype=torch.float64)
    return [round(x.mean().item(), 3), round(2.365 * (x.std() / math.sqrt(len(x))).item(), 3)]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--scenes", type=positive, default=8)
    parser.add_argument("--clips", type=positive, default=4)
    parser.add_argument("--overlap", type=positive, nargs="+", default=[2, 3, 4])
    parser.add_argument("--steps", type=positive, default=4)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    pipeline = load_walker(given.model)
    ways = [(s, 0) for s in SEAMS if s != "overlap"] + [("overlap", frames) for frames in given.overlap]
    found = {
        f"{seams} {overlap or ''}".strip(): [
            one(pipeline, index, given.clips, given.steps, seams, overlap) for index in range(given.scenes)
        ]
        for seams, overlap in ways
    }
    first, rows = found[SEAMS[0]], {}
    for seams, values in found.items():
        pairs = list(zip(values, first, strict=True))
        rows[seams] = {
            "clips": values[0][2],
            "seam": interval([a[0] for a in values]),
            "psnr": interval([a[1] for a in values]),
            "seam_gain": interval([a[0] - b[0] for a, b in pairs]),
            "psnr_gain": interval([a[1] - b[1] for a, b in pairs]),
        }
        print(seams, rows[seams])
    result = {"scenes": given.scenes, "clips": given.clips, "steps": given.steps, "model": given.model, "seams": rows}
    if given.out:
        write_json(given.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
