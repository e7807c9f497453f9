"""What a student saves: seconds of a clip by part, the teacher's whole steps against few.

    python benchmarks/speed.py [--teacher tiny] [--student DIR] [--data builtin] [--clips 5] [--steps 1 2 4 8]
        [--size HxW] [--device cpu] [--name speed-tiny]

What is measured: encoding the render, sampling, decoding, for the teacher as published (all its steps, guided) and for
a student in each of --steps: the one given, else the teacher's own network sampled as a student is, for weights do not
change what a pass costs. All run on one clip after the other in turn, after one that does not count; medians over
clips, and ratios of the same clip's times. Why: "90 % faster" is the paper's claim (its section 5.2: 13.2 s for 16
frames of 320x512 against about one). Writes benchmarks/results/NAME.json and .md; the last line is JSON.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
from functools import partial
from pathlib import Path

import torch
from pages import page

from fvgen.cli import existing, numbers
from fvgen.pipelines.folders import check_device, load_pipeline
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.reports.data import open_clips
from fvgen.reports.evaluate import PARTS, Contestant, Result, evaluate, few_step_teachers, teacher_contestant
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import atomic_path, write_json, write_text

RESULTS = Path(__file__).parent / "results"
PAPER = "the paper: 13.2 s with ViewCrafter's 50 steps, about 1 s with FVGen's 4, 16 frames, one H100"


def student_contestants(student: StudentPipeline | None, teacher: TeacherPipeline, steps: list[int]) -> dict:
    """By name; without a student, the teacher's network in its place."""
    if student is None:
        return {f"student, {count} steps": few_step_teachers(teacher, count)["renoise, plain"] for count in steps}
    return {
        f"student, {count} steps": Contestant(partial(student.sample, num_inference_steps=count), count, count)
        for count in steps
    }


def row_of(name: str, result: Result, whole: list[float], frames: int) -> dict:
    """Medians over clips; ``whole``: the teacher's seconds of each."""
    seconds = [sum(parts.values()) for parts in result.seconds]
    row: dict = {"model": name, "nfe": result.contestant.nfe}
    row |= {f"{part}_s": round(statistics.median(parts[part] for parts in result.seconds), 3) for part in PARTS}
    row |= {
        "clip_s": round(statistics.median(seconds), 3),
        "frames_per_s": round(frames / statistics.median(seconds), 2),
    }
    row["teacher_over_this"] = round(statistics.median(a / b for a, b in zip(whole, seconds, strict=True)), 2)
    sampling = [parts["sample"] / sum(parts.values()) for parts in result.seconds]
    return row | {"share_of_sampling": round(statistics.median(sampling), 3)}


def note(result: dict) -> str:
    """The result as a page of Markdown."""
    return page("Seconds of a clip", "speed.py", [PAPER], result)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--teacher", default="tiny")
    parser.add_argument("--student", help="a model folder; the teacher's network if not given")
    parser.add_argument("--data", default="builtin", help="shards with frames, clips, scenes, or builtin")
    parser.add_argument("--clips", type=positive, default=5)
    parser.add_argument("--steps", type=positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--size", help="of clips made from scenes, HEIGHTxWIDTH")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prepared", default="runs/speed-clips", help="where scenes are prepared")
    parser.add_argument("--name", default="speed-tiny", help="of the files in benchmarks/results")
    args = parser.parse_args()
    existing(args.data)
    check_device(args.device)
    size = numbers(args.size, "x", "size", "320x512") if args.size else None
    teacher = load_pipeline(args.teacher, TeacherPipeline).to(args.device)
    student = load_pipeline(args.student, StudentPipeline).to(args.device) if args.student else None
    found = open_clips(args.data, args.prepared, args.teacher, size=size, device=args.device)
    clips = [found[index % len(found)] for index in range(args.clips + 1)]
    contestants = {"teacher": teacher_contestant(teacher)} | student_contestants(student, teacher, args.steps)
    results = evaluate(contestants, clips, teacher, 0)
    for result in results.values():
        del result.seconds[0]  # whose memory was new
    whole = [sum(parts.values()) for parts in results["teacher"].seconds]
    rows = [row_of(name, result, whole, found.frames) for name, result in results.items()]
    cuda = torch.device(args.device).type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    settings = {
        "teacher": args.teacher,
        "student": args.student or "the teacher's network",
        "clip": f"{found.frames} frames of {found.height}x{found.width}",
        "clips": args.clips,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "peak memory, GB": round(peak / 1e9, 2),
    }
    result = {"settings": settings, "parts": {"seconds": rows}}
    write_json(RESULTS / f"{args.name}.json", result)
    with atomic_path(RESULTS / f"{args.name}.md") as temporary:
        write_text(temporary, note(result))
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
