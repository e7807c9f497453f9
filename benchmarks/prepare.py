"""What `fvgen prepare` makes of real scenes, how fast it is, step by step, and whether its memory stays flat.

    python benchmarks/prepare.py --data DIR [--parts memory speed workers scenes] [--name prepare]

What is measured, with the encoders of the tiny teacher (published ones take longer):

* memory: of the process, on the first of --scenes at the preset's size, after a tenth of --flat clips and at the end.
* speed: of each of --scenes, clips per second of one process on one thread, and where the seconds go.
* workers: the first of --scenes four times over, with one and with two processes: clips per second of the clock, the
  shares of the time in which the workers had a core each, and wanted one (what is missing from 1 they idled), and the
  share of all cores that nobody wanted. Where other work runs beside it, only wanted_a_core and the processor's seconds
  say something of ours.
* scenes: every scene of DIR with `--points auto` and the filters as they are: what became of the clips, and why. 16
  frames each; where a scene has fewer views or no clip comes out, 8, then 5.

Each part replaces its section of results/NAME.json and keeps the others (scenes that are in it already are not made
again); NAME.md is written from it. The last line is JSON.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from pages import page

from fvgen.calls import numbers
from fvgen.errors import UserError
from fvgen.scenes.formats import find_scenes, read_scene
from fvgen.shards.prepare import prepare
from fvgen.shards.reader import ShardSet
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import atomic_path, write_json

RESULTS = Path(__file__).parent / "results"
STEPS = ("read", "choose", "points", "load", "render", "filter", "encode", "write")
ALL_KEPT = {"points": 0.0, "overlap": 0.0, "sharpness": 0.0, "motion": 0.0}
FRAMES = (16, 8, 5)
REMARKS = (
    "seconds of steps are of processor time, per clip",
    "where processor_share or had_a_core is far below 1, other work had the cores; the clock says little then",
)


def memory(folder: Path, clips: int) -> dict:
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
    return {"clips": tally.clips, "mb_in_first_tenth": round(tenth), "mb_at_most": round(max(mb for _, mb in used))}


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
    return row | {f"{step}_s": round(tally.seconds[step] / max(1, tally.clips), 3) for step in STEPS}


def workers(folder: Path, size: tuple[int, int], frames: int, count: int, processes: int) -> dict:
    """Clips per second of the clock; the start of the processes, seconds of imports, counts in that alone."""
    seen: list[tuple[float, float]] = []
    process = psutil.Process()

    def watch(done: int, total: int) -> None:
        ours = [process] if processes == 1 else [worker for child in process.children() for worker in child.children()]
        if len(ours) == processes:  # all are there
            seen.append((time.perf_counter(), sum(map(_wanted, ours))))

    with tempfile.TemporaryDirectory() as out:
        before, clock = psutil.cpu_times(), time.perf_counter()
        tally = prepare(
            [folder] * 4, Path(out) / "shards", frames, size, clips_per_scene=count, clips_per_shard=count,
            workers=processes, limits=ALL_KEPT, on_progress=watch,
        )  # fmt: skip
        clock, after = time.perf_counter() - clock, psutil.cpu_times()
    (start, first), (end, last) = seen[0], seen[-1]
    return {
        "workers": processes,
        "clips": tally.clips,
        "seconds": round(clock, 1),
        "clips_per_second": round(tally.clips / clock, 3),
        "processor_s_per_clip": round(sum(tally.seconds.values()) / tally.clips, 2),
        "had_a_core": round(sum(tally.seconds.values()) / clock / processes, 2),
        "wanted_a_core": round((last - first) / (end - start) / processes, 2),
        "machine_idle": round((after.idle - before.idle) / clock / psutil.cpu_count(), 2),
    }


def _wanted(process: psutil.Process) -> float:
    """Seconds in which a process of one thread ran, or stood in the queue for a core (Linux counts them)."""
    ran, queued, _ = Path(f"/proc/{process.pid}/schedstat").read_text().split()
    return (int(ran) + int(queued)) / 1e9


def outcome(folder: Path, size: tuple[int, int], frames: int, count: int) -> dict:
    """What became of ``count`` clips of a scene."""
    with tempfile.TemporaryDirectory() as out:
        clock = time.perf_counter()
        row = {"scene": folder.name, "views": len(read_scene(folder)), "frames": frames, "tried": count, "clips": 0}
        try:
            tally = prepare([folder], Path(out) / "shards", frames, size, clips_per_scene=count, workers=1)
        except UserError as error:  # not one clip
            return row | {"dropped": str(error), "clock_s": round(time.perf_counter() - clock)}
        records = ShardSet(Path(out) / "shards").records
    said = [f"{number} x {reason}" for reason, number in tally.dropped.most_common()]
    row["clips"] = tally.clips
    row["dropped"] = "; ".join(said + [f"{entry.name}: {entry.reason}" for entry in tally.skipped])
    row["points_from"] = _counts(record.points for record in records)
    row["strides"] = _counts("by pose" if record.stride is None else str(record.stride) for record in records)
    for key in ("overlap", "points"):
        row[key] = round(torch.tensor([record.figures[key] for record in records]).median().item(), 3)
    row["processor_s"] = round(sum(tally.seconds.values()))
    return row | {"clock_s": round(time.perf_counter() - clock)}


def _counts(words) -> str:
    return ", ".join(f"{word} ({number})" for word, number in sorted(Counter(words).items()))


def note(results: dict) -> str:
    """The results as a page of Markdown."""
    return page("Preparing clips", "prepare.py", REMARKS, results)


def main() -> None:
    parser = Parser(__doc__)
    parts = ["memory", "speed", "workers", "scenes"]
    parser.add_argument("--data", required=True, help="folder of scenes")
    parser.add_argument("--parts", default=parts, choices=parts, nargs="+")
    parser.add_argument("--scenes", default=["hololens_office", "fox"], nargs="+")
    parser.add_argument("--size", default="320x512")
    parser.add_argument(
        "--clips", default=2, type=positive, help="of each scene; the part `scenes` tries twice as many"
    )
    parser.add_argument("--flat", default=500, type=positive, help="clips over which memory is watched")
    parser.add_argument("--name", default="prepare", help="of the files in benchmarks/results")
    args = parser.parse_args()

    torch.set_num_threads(1)
    size, data = numbers(args.size, "x", "size", "320x512"), Path(args.data)
    chosen = [data / name for name in args.scenes]
    file = RESULTS / f"{args.name}.json"
    results = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    results["settings"] = {"hardware": "2-core CPU, processes of one thread", "torch": torch.__version__}
    everything = {  # memory first: what larger frames left would hide growth
        "memory": lambda: (memory(chosen[0], args.flat) for _ in range(1)),
        "speed": lambda: (speed(folder, size, FRAMES[0], args.clips) for folder in chosen),
        "workers": lambda: (workers(chosen[0], size, FRAMES[0], args.clips, number) for number in (1, 2)),
        "scenes": lambda: _outcomes(data, size, 2 * args.clips, results["parts"].get("scenes", [])),
    }
    for part in (part for part in parts if part in args.parts):
        rows = []
        for row in everything[part]():
            rows.append(row)
            print(row, flush=True)
            results["parts"][part] = rows
            write_json(file, results)
            with atomic_path(RESULTS / f"{args.name}.md") as temporary:
                temporary.write_text(note(results))
    print(json.dumps(results))


def _outcomes(data: Path, size: tuple[int, int], count: int, known: list[dict]):
    """A row for each try of each scene, the ``known`` ones first; a scene's last try is the one that gave clips."""
    yield from (finished := list(known))
    for folder in find_scenes(data):
        mine = [row for row in finished if row["scene"] == folder.name]
        for frames in FRAMES:
            if any(row["clips"] for row in mine):
                break
            if len(read_scene(folder)) >= frames and all(row["frames"] != frames for row in mine):
                mine.append(outcome(folder, size, frames, count))
                yield mine[-1]


if __name__ == "__main__":
    guarded(main)
