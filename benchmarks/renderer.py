"""Seconds and memory of the point renderer, on one core of a CPU or on a GPU.

    python benchmarks/renderer.py [--size 320x512] [--views 1 4] [--repeats 3] [--device cpu] [--name renderer]

What is measured: `render_points` with ViewCrafter's settings (radius 0.01, 10 points per pixel) on the clouds of two
views, 2 x H x W points, seen from cameras between and beside them: the median seconds per view (on a CPU those of the
processor, which equal the clock's on an idle core), and the largest resident memory of a fresh process that does
nothing else, libraries included. Why: clips are made of such frames, and
PyTorch3D, which they are made with elsewhere, cannot be installed on most machines. Writes results/NAME.json and
NAME.md; the last line is JSON.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import statistics
import subprocess
import time
from pathlib import Path

import torch

from fvgen.geometry.cameras import Cameras, look_at, pinhole
from fvgen.geometry.pointcloud import render_points, unproject
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import atomic_path, write_json

RESULTS = Path(__file__).parent / "results"


def clouds(height: int, width: int, views: int) -> tuple[torch.Tensor, torch.Tensor, Cameras]:
    """Two wavy walls, each seen by its own camera, and ``views`` cameras from the first to beyond the second."""
    s = torch.cat([torch.tensor([0.0, 1.0]), torch.linspace(0, 1.2, views)])
    position = torch.stack([s - 0.5, 0.1 * s, -0.2 * s], dim=-1)
    poses = look_at(position, torch.tensor([[0.0, 0.0, 4.0]]).expand_as(position), torch.tensor([0.0, -1.0, 0.0]))
    cameras = Cameras(poses, pinhole(len(s), height, width, 60), height, width)
    y, x = torch.meshgrid(torch.linspace(0, 4, height), torch.linspace(0, 6, width), indexing="ij")
    depth = torch.stack([4 + 0.5 * torch.sin(math.pi * x), 3.5 + 0.5 * torch.cos(math.pi * y)])
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return *unproject(depth, images, cameras[:2]), cameras[2:]


def measure(height: int, width: int, views: int, repeats: int, device: str) -> dict:
    """Median seconds per view, and the peak of memory in MB: of the process on a CPU, of tensors on a GPU."""
    torch.set_num_threads(1)
    points, colors, cameras = clouds(height, width, views)
    points, colors, cameras = points.to(device), colors.to(device), cameras.to(device)
    before = _peak(device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        _, visibility, _ = render_points(points, colors, cameras)
        covered = visibility.gt(0).float().mean().item()  # waits for a GPU
        seconds.append((clock() - start) / views)
    return {
        "size": f"{height}x{width}",
        "points": len(points),
        "views": views,
        "covered": round(covered, 3),
        "seconds_per_view": round(statistics.median(seconds[1:]), 4),  # the first also warms up
        "peak_mb": round(_peak(device)),
        "before_mb": round(before),
    }


def _peak(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e6
    # Not getrusage: its peak is inherited from the parent process.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def note(settings: dict, rows: list[dict]) -> str:
    """The results as a page of Markdown."""
    lines = ["# The point renderer: seconds and memory", "", "Written by benchmarks/renderer.py.", ""]
    lines += [f"- {key}: {value}" for key, value in settings.items()]
    lines += [
        "",
        "| size | points | views | seconds per view | peak MB | of which before rendering |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['size']} | {row['points']} | {row['views']} | {row['seconds_per_view']:.3f} "
            f"| {row['peak_mb']} | {row['before_mb']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--size", default=["320x512"], nargs="+", help="HEIGHTxWIDTH")
    parser.add_argument("--views", default=[1, 4], nargs="+", type=positive)
    parser.add_argument("--repeats", default=3, type=positive)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="renderer", help="of the files in benchmarks/results")
    args = parser.parse_args()

    from fvgen.pipelines.folders import check_device  # imports much, which the processes that are measured must not

    check_device(args.device)
    fresh = multiprocessing.get_context("spawn")
    rows = []
    for size in args.size:
        for views in args.views:
            with fresh.Pool(1) as pool:
                rows.append(pool.apply(measure, (*map(int, size.split("x")), views, args.repeats, args.device)))
            print(rows[-1])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    settings = {
        "command": f"python benchmarks/renderer.py --device {args.device} --repeats {args.repeats}",
        "commit": commit.stdout.strip(),
        "hardware": "2-core CPU, one thread" if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "torch": torch.__version__,
    }
    write_json(RESULTS / f"{args.name}.json", settings | {"rows": rows})
    with atomic_path(RESULTS / f"{args.name}.md") as temporary:
        temporary.write_text(note(settings, rows))
    print(json.dumps(settings | {"rows": rows}))


if __name__ == "__main__":
    guarded(main)
