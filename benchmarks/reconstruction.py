"""Does generating views help the 3D scene that is fitted to them?

    python benchmarks/reconstruction.py [--scenes builtin:0 builtin:1 PATH ...] [--model tiny] [--steps 4] [--given 5]
        [--seeds 0 1 2] [--generated-weight 0.1] [--iterations 500] [--points auto] [--out FILE]

What is measured: photographs given nowhere (all but --given; as `fvgen generate --holdout` keeps them), shown by 3D
Gaussians fitted to (given) the given photographs alone, (generated) those and what the model made on the walk through
them, (render) those and the point renders that the model was given. All three start at the same points, with the same
settings. Why: a video that looks well may still spoil the scene ("the video is made all right but the splat is bad").
A built-in scene is a room with exact depth and nine photographs. Rows: a scene and a seed; gains are paired by scene,
means over its seeds. --generated-weight is that of every view that is no photograph. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.clips.rooms import drawn_scene, render_scene
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.gaussians import render_gaussians
from fvgen.geometry.pointcloud import unproject
from fvgen.metrics import score_images
from fvgen.metrics.intervals import paired
from fvgen.scenes.images import fit_image
from fvgen.splats.fitting import FitSettings, fit, seeds
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import write_json
from fvgen.walks.chain import chain
from fvgen.walks.dataset import View, write_views
from fvgen.walks.given import open_given
from fvgen.walks.run import SEAM, VIEWS, Choices, load_walker, plan_walk, walk_needs

BUILTIN = "builtin:"
PHOTOGRAPHS = 9  # of a built-in scene
MOST_POINTS = 20_000
KINDS = ("given", "generated", "render")


def built_in(number: int, folder: Path) -> Path:
    """Room ``number`` of the test split as a posed scene with depth maps."""
    scene, cameras, _ = drawn_scene("test", 0, number, PHOTOGRAPHS, 48, 64)
    images, depth = render_scene(scene, cameras)
    write_views(folder, [View(f"{k}.png", image, False) for k, image in enumerate(images)], cameras)
    return with_depth(folder, depth)


def with_depth(folder: Path, depth: Tensor) -> Path:
    """Adds depth maps in millimetres to what `write_views` wrote."""
    from PIL import Image

    document = json.loads((folder / "transforms.json").read_text())
    for k, frame in enumerate(document["frames"]):
        frame["depth_file_path"] = f"images/depth_{k}.png"
        Image.fromarray((depth[k] * 1000).round().to(torch.int32).numpy()).convert("I;16").save(
            folder / frame["depth_file_path"]
        )
    write_json(folder / "transforms.json", document)
    return folder


def measure(scene: Path, args: Any, seed: int, pipeline: Any) -> dict[str, dict[str, Any]]:
    """Scores at the photographs held out, by what was fitted to."""
    held = len(open_given([scene], args.points).order) - args.given
    choices = Choices(args.model, None, None, args.steps, None, seed, args.points, VIEWS, SEAM, None, holdout=held)
    needs = walk_needs(pipeline, choices)
    plan = plan_walk([scene], choices, needs, print, {})
    video = chain(pipeline, plan.rendered, needs.frames, args.steps, seed, SEAM)
    height, width = video.shape[2:]
    fitted, walk = plan.given.scene.cameras.fitted(height, width), plan.walk.cameras.to(dtype=torch.float32)
    photographs = torch.stack([fit_image(plan.given.scene.image(v), height, width) for v in plan.given.order])
    truth = torch.stack([fit_image(plan.given.scene.image(v), height, width) for v in plan.held])
    novel = [frame for frame in range(len(video)) if frame not in plan.walk.known]

    points, colors = unproject(plan.cloud.depth, plan.cloud.photographs, plan.cloud.cameras)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(points), generator=generator)[:MOST_POINTS]
    settings = FitSettings(iterations=args.iterations, generated_weight=args.generated_weight)
    start = seeds(points[chosen].float(), colors[chosen].float(), settings.most, generator)
    found: dict[str, dict[str, Any]] = {}
    extras = (None, video[novel], plan.rendered.frames[novel])
    for name, extra in zip(KINDS, extras, strict=True):
        images, cameras = photographs, fitted[plan.given.order]
        weights = torch.ones(len(photographs))
        if extra is not None:
            images = torch.cat([photographs, extra])
            weights = torch.cat([weights, torch.full((len(extra),), settings.generated_weight)])
            poses = torch.cat([cameras.world_from_cam, walk.world_from_cam[novel]])
            cameras = Cameras(poses, torch.cat([cameras.intrinsics, walk.intrinsics[novel]]), height, width)
        made = fit(images, cameras, start, settings, weights, seed)
        with torch.no_grad():
            shown = render_gaussians(made, fitted[plan.held])[0].clamp(0, 1)
        found[name] = {key: score_images(shown, truth)[key] for key in ("psnr", "ssim", "lpips")}
        print(scene.name, seed, name, found[name], flush=True)
    return found


def by_scene(rows: list[dict[str, Any]], kind: str, metric: str) -> list[float]:
    """A value a scene, the mean of its seeds; none where the metric has none."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["fitted_to"] == kind and row[metric] is not None:
            found.setdefault(row["scene"], []).append(row[metric])
    return [statistics.mean(values) for values in found.values()]


def main() -> None:
    parser = Parser(__doc__, {"--weight": "--generated-weight"})
    parser.add_argument("--scenes", nargs="+", default=["builtin:0", "builtin:1"], help="builtin:N, or posed scenes")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=positive, default=4)
    parser.add_argument("--given", type=positive, default=5, help="photographs; the others are held out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--generated-weight", type=float, default=FitSettings.generated_weight)
    parser.add_argument("--iterations", type=positive, default=500)
    parser.add_argument("--points", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pipeline, rows, left_out = load_walker(args.model), [], {}
    with tempfile.TemporaryDirectory() as work:
        for name in args.scenes:
            number = name.removeprefix(BUILTIN)
            built = name != number
            scene = built_in(int(number), Path(work) / f"room{number}") if built else Path(name)
            for seed in args.seeds:
                try:
                    found = measure(scene, args, seed, pipeline)
                except UserError as error:  # one scene that cannot be walked through is a row, too
                    left_out[name] = str(error)
                    print(name, error, flush=True)
                    break
                rows += [{"scene": name, "seed": seed, "fitted_to": kind, **row} for kind, row in found.items()]
    psnr = {kind: by_scene(rows, kind, "psnr") for kind in KINDS}
    mean = {kind: statistics.mean(each) for kind, each in psnr.items() if each}
    gains = {
        f"{kind} minus given, {metric}": paired(by_scene(rows, kind, metric), by_scene(rows, "given", metric))
        for kind in KINDS[1:]
        for metric in ("psnr", "lpips")
        if by_scene(rows, kind, metric)
    }
    words = {key: value if not isinstance(value, Path) else str(value) for key, value in vars(args).items()}
    result = {
        "settings": words,
        "psnr": mean,
        "gains": gains,
        "left_out": left_out,
        "rows": rows,
    }
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
