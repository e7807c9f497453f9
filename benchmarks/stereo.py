"""How good stereo depth is, against the triangulated points of real scenes.

    python benchmarks/stereo.py --data DIR [--scenes fox hololens_office vr_apartment] [--views 4] [--name stereo]

What is measured: `point_maps(..., "stereo")` on evenly spaced views, with the scene's points and depth maps hidden from
it; the relative error at the points that were found in the view (median, 90th percentile), the share of these and of
all pixels that got a depth, and processor seconds per view, neighbours included. Why: it is what makes renders from
photographs on a machine without network weights. Writes results/NAME.json and NAME.md; the last line is JSON.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from fvgen.cli import Parser, guarded, positive
from fvgen.data.point_maps import STEREO_SIDE, point_maps
from fvgen.data.scenes import Scene, read_scene
from fvgen.geometry.cameras import project
from fvgen.storage import atomic_path, write_json

RESULTS = Path(__file__).parent / "results"
TARGETS = "targets: median error at most 5 %, coverage at least 60 %"


def measure(scene: Scene, count: int) -> dict:
    """Errors and coverage over ``count`` views of a scene with points."""
    scale = STEREO_SIDE / max(scene.cameras.height, scene.cameras.width)
    height, width = round(scene.cameras.height * scale), round(scene.cameras.width * scale)
    views = torch.linspace(0, len(scene) - 1, count + 2)[1:-1].long().tolist()
    bare = replace(scene, points=None, point_colors=None, observations=None, depth_paths=None)
    start = time.process_time()
    depth, _ = point_maps(bare, views, height, width, "stereo")
    seconds = (time.process_time() - start) / count
    pixels, true = project(scene.points, scene.cameras.fitted(height, width))
    errors, found = [], []
    for one, view in zip(depth, views, strict=True):
        x, y = pixels[view].floor().long().unbind(-1)
        shown = scene.seen_by(view) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
        value = one[y[shown], x[shown]]
        found.append((value > 0).float())
        errors.append((value / true[view, shown] - 1).abs()[value > 0])
    quantiles = torch.quantile(torch.cat(errors), torch.tensor([0.5, 0.9])).tolist()
    return {
        "scene": scene.name,
        "size": f"{height}x{width}",
        "views": count,
        "points": sum(len(part) for part in found),
        "median_error": round(quantiles[0], 4),
        "p90_error": round(quantiles[1], 4),
        "points_covered": round(torch.cat(found).mean().item(), 3),
        "pixels_covered": round((depth > 0).float().mean().item(), 3),
        "seconds_per_view": round(seconds, 1),
    }


def note(settings: dict, rows: list[dict]) -> str:
    """The results as a page of Markdown."""
    lines = ["# Stereo depth against triangulated points", "", "Written by benchmarks/stereo.py.", ""]
    lines += [f"- {key}: {value}" for key, value in settings.items()]
    lines += [f"- {TARGETS}", "", f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="folder of scenes with points")
    parser.add_argument("--scenes", default=["fox", "hololens_office", "vr_apartment"], nargs="+")
    parser.add_argument("--views", default=4, type=positive)
    parser.add_argument("--name", default="stereo", help="of the files in benchmarks/results")
    args = parser.parse_args()

    torch.set_num_threads(1)
    rows = []
    for name in args.scenes:
        rows.append(measure(read_scene(Path(args.data) / name), args.views))
        print(rows[-1], flush=True)
    settings = {"hardware": "2-core CPU, one thread", "torch": torch.__version__}
    write_json(RESULTS / f"{args.name}.json", settings | {"rows": rows})
    with atomic_path(RESULTS / f"{args.name}.md") as temporary:
        temporary.write_text(note(settings, rows))
    print(json.dumps(settings | {"rows": rows}))


if __name__ == "__main__":
    guarded(main)
