"""Which camera and consistency statistics rank clips as they should.

    python benchmarks/consistency.py [--rooms 8 9 10 11 12 13] [--name consistency]

A built-in room seen by 9 cameras on a path, 320x512, the first and the last picture given, the 7 between "generated" in
four ways that rank in this order:

* true: rendered from the cameras that were asked for.
* blurred: the same, after a Gaussian of 3 pixels.
* wrong: sharp, but rendered at another pace: picture k of 8 shows (k / 8)^2 of the path in place of k / 8.
* noise: uniform noise, new in each frame.

Each is scored as `fvgen evaluate CLIP --cameras` does. For every statistic of STATISTICS the page says in how many of
the scenes it has all four in this order, and which of the three steps (true before blurred, ...) it keeps. A statistic
that does not exist (nothing placed, nothing matched) ranks last; a tie keeps no order. Settings (the contrast and the
number of points that COLMAP asks for, the half pixel of "agreeing") were chosen on rooms 0 to 7; the default ones were
not looked at before. Each room replaces its own rows in results/NAME.json. The last line is JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pages import page
from torch import Tensor

from fvgen.clips.rooms import clear_the_way, make_path, make_scene, render_scene, scene_generator
from fvgen.geometry.cameras import Cameras
from fvgen.reports.compare import compare
from fvgen.system.command import Parser, guarded
from fvgen.system.files import atomic_path, write_json
from fvgen.walks.dataset import View, write_views

RESULTS = Path(__file__).parent / "results"
FRAMES = 9
BLUR = 3.0  # pixels
KINDS = ("true", "blurred", "wrong", "noise")
STATISTICS = {  # name: the family that has it, and whether more is better
    "rotation_degrees": ("camera_error", False),
    "position_of_extent": ("camera_error", False),
    "obeyed": ("camera_error", True),
    "registered": ("consistency", True),
    "track_length": ("consistency", True),
    "reprojection": ("consistency", False),
    "observations": ("consistency", True),
    "sampson": ("consistency", False),
    "agreeing": ("consistency", True),
}


def clips(index: int, height: int = 320, width: int = 512) -> Iterator[tuple[str, Tensor, Cameras]]:
    """(kind, pictures [F, 3, H, W], the cameras that were asked for) of one room."""
    generator = scene_generator("consistency", 0, index)
    scene = make_scene(generator, f"consistency-{index}")
    fine = make_path(generator, scene, (FRAMES - 1) ** 2 + 1, height, width)
    scene = clear_the_way(scene, fine)
    cameras = fine[[(FRAMES - 1) * k for k in range(FRAMES)]]
    true, _ = render_scene(scene, cameras)
    middle = slice(1, FRAMES - 1)
    for kind in KINDS:
        pictures = true.clone()
        if kind == "blurred":
            pictures[middle] = blurred(true[middle], BLUR)
        elif kind == "wrong":
            pictures[middle] = render_scene(scene, fine[[k * k for k in range(1, FRAMES - 1)]])[0]
        elif kind == "noise":
            pictures[middle] = torch.rand(true[middle].shape, generator=generator)
        yield kind, pictures, cameras


def blurred(images: Tensor, sigma: float) -> Tensor:
    """[F, 3, H, W] after a Gaussian."""
    reach = math.ceil(3 * sigma)
    row = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (row / row.sum()).expand(3, 1, 1, -1)
    wide = torch.nn.functional.conv2d(
        torch.nn.functional.pad(images, (reach, reach, reach, reach), mode="replicate"), kernel, groups=3
    )
    return torch.nn.functional.conv2d(wide, kernel.transpose(2, 3), groups=3)


def write_clip(folder: Path, pictures: Tensor, cameras: Cameras) -> Path:
    """As `fvgen generate` leaves one: the ends are given, the rest is generated."""
    ends = (0, len(pictures) - 1)
    views = [View(f"frame_{k:05d}.png", picture, k not in ends) for k, picture in enumerate(pictures)]
    write_views(folder, views, cameras)
    return folder


def measure(index: int, height: int = 320, width: int = 512) -> list[dict[str, Any]]:
    """A row for each kind of clip of one room."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, pictures, cameras in clips(index, height, width):
            found = compare(write_clip(Path(folder) / kind, pictures, cameras), cameras=True)
            values = {name: found[family][name] for name, (family, _) in STATISTICS.items()}
            rows.append({"room": index, "clip": kind} | {n: v if v is None else round(v, 5) for n, v in values.items()})
            print(rows[-1], flush=True)
    return rows


def ranking(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each statistic, of how many rooms it has all kinds, and each kind before the next, in the right order."""
    rooms = sorted({row["room"] for row in rows})
    table = []
    for name, (family, more) in STATISTICS.items():

        def badness(room: int, kind: str, name: str = name, more: bool = more) -> float:
            value = next(row[name] for row in rows if (row["room"], row["clip"]) == (room, kind))
            return math.inf if value is None else (-value if more else value)

        steps = {
            pair: [badness(room, pair[0]) < badness(room, pair[1]) for room in rooms]
            for pair in itertools.pairwise(KINDS)
        }
        whole = sum(all(step[k] for step in steps.values()) for k in range(len(rooms)))
        row = {"statistic": name, "of": family, "all in order": f"{whole} of {len(rooms)}"}
        table.append(row | {f"{a} < {b}": f"{sum(step)} of {len(rooms)}" for (a, b), step in steps.items()})
    return table


def note(results: dict) -> str:
    """The results as a page of Markdown."""
    return page("Do the statistics rank clips?", "consistency.py", [], results)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--rooms", default=range(8, 14), type=int, nargs="+", help="numbers of built-in rooms")
    parser.add_argument("--name", default="consistency", help="of the files in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / f"{args.name}.json"
    rows = json.loads(file.read_text())["parts"]["clips"] if file.exists() else []
    for room in args.rooms:
        rows = sorted([row for row in rows if row["room"] != room] + measure(room), key=lambda row: row["room"])
        settings = {"size": "320x512", "frames": FRAMES, "given": "first and last", "torch": torch.__version__}
        results = {"settings": settings, "parts": {"ranking": ranking(rows), "clips": rows}}
        write_json(file, results)
        with atomic_path(file.with_suffix(".md")) as temporary:
            temporary.write_text(note(results))
    print(json.dumps(results["parts"]["ranking"]))


if __name__ == "__main__":
    guarded(main)
