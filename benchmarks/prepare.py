"""How fast `fvgen prepare` is, step by step, and whether its memory stays flat.

    python benchmarks/prepare.py --data DIR [--scenes hololens_office fox] [--size 320x512] [--clips 2] [--flat 500]

What is measured: for each scene, clips per second of one process on one thread, and where the seconds go; and, on the
first scene at the tiny preset's size, the memory of the process after a tenth of ``--flat`` clips and at the end. Why:
data sets have a hundred thousand clips. The encoders are the tiny teacher's: published ones take longer. Writes
results/NAME.json and NAME.md; the last line is JSON.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import psutil
import torch

from fvgen.cli import Parser, guarded, numbers, positive
from fvgen.prepare import prepare
from fvgen.storage import atomic_path, write_json

RESULTS = Path(__file__).parent / "results"
STEPS = ("read", "choose", "points", "load", "render", "filter", "encode", "write")
ALL_KEPT = {"points": 0.0, "overlap": 0.0, "sharpness": 0.0, "motion": 0.0}


def speed(folder: Path, size: tuple[int, int], frames: int, count: int) -> dict:
    """Clips per second, and seconds per clip of each step; all seconds are of processor time."""
    with tempfile.TemporaryDirectory() as out:
        start, clock = time.process_time(), time.perf_counter()
        tally = prepare([folder], Path(out) / "shards", frames, size, clips_per_scene=count, workers=1, limits=ALL_KEPT)
        busy, clock = time.process_time() - start, time.perf_counter() - clock
    row = {
        "scene": folder.name,
        "size": f"{size[0]}x{size[1]}",
        "frames": frames,
        "clips": tally.clips,
        "clips_per_second": round(tally.clips / busy, 3),
        "processor_share": round(busy / clock, 2),
    }
    return row | {f"{step} s": round(tally.seconds[step] / max(1, tally.clips), 3) for step in STEPS}


def flatness(folder: Path, clips: int) -> dict:
    """Resident memory over many small clips: the same scene again and again, under other names."""
    used: list[tuple[int, float]] = []
    process = psutil.Process()

    def watch(done: int, total: int) -> None:
        used.append((done, process.memory_info().rss / 2**20))

    per_scene = 20
    with tempfile.TemporaryDirectory() as out:
        sources = [folder] * -(-clips // per_scene)
        tally = prepare(
            sources, Path(out) / "shards", clips_per_scene=per_scene, workers=1, limits=ALL_KEPT, on_progress=watch
        )
    tenth = max(mb for done, mb in used if done <= len(used) // 10)
    return {"clips": tally.clips, "mb_at_a_tenth": round(tenth), "mb_at_most": round(max(mb for _, mb in used))}


def note(settings: dict, rows: list[dict], flat: dict) -> str:
    """The results as a page of Markdown."""
    lines = ["# Preparing clips: seconds by step", "", "Written by benchmarks/prepare.py.", ""]
    lines += [f"- {key}: {value}" for key, value in settings.items()]
    lines += [
        "- seconds are of processor time, per clip; other work ran on the machine where processor_share is below 1"
    ]
    lines += ["", f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    lines += [
        "",
        f"Memory over {flat['clips']} clips of 48x64: {flat['mb_at_a_tenth']} MB at most in the first tenth, ",
    ]
    lines[-1] += f"{flat['mb_at_most']} MB at most in all."
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="folder of scenes")
    parser.add_argument("--scenes", default=["hololens_office", "fox"], nargs="+")
    parser.add_argument("--size", default="320x512")
    parser.add_argument("--frames", default=16, type=positive)
    parser.add_argument("--clips", default=2, type=positive, help="of each scene")
    parser.add_argument("--flat", default=500, type=positive, help="clips over which memory is watched")
    parser.add_argument("--name", default="prepare", help="of the files in benchmarks/results")
    args = parser.parse_args()

    torch.set_num_threads(1)
    size = numbers(args.size, "x", "size", "320x512")
    flat = flatness(Path(args.data) / args.scenes[0], args.flat)  # first: what larger frames left would hide growth
    print(flat, flush=True)
    rows = []
    for name in args.scenes:
        rows.append(speed(Path(args.data) / name, size, args.frames, args.clips))
        print(rows[-1], flush=True)
    settings = {"hardware": "2-core CPU, one process, one thread", "torch": torch.__version__}
    write_json(RESULTS / f"{args.name}.json", settings | {"rows": rows, "memory": flat})
    with atomic_path(RESULTS / f"{args.name}.md") as temporary:
        temporary.write_text(note(settings, rows, flat))
    print(json.dumps(settings | {"rows": rows, "memory": flat}))


if __name__ == "__main__":
    guarded(main)
