"""What a student saves: seconds of a clip by part and peak memory, the teacher's whole steps against few.

    python benchmarks/speed.py [--config tiny] [--teacher tiny] [--student DIR] [--data builtin] [--clips 5]
        [--steps 1 2 4 8] [--size HxW] [--device cpu] [--out DIR] [--name speed-tiny]

What is measured: drawing the points, encoding the render, sampling, decoding, for the teacher as published (all its
steps, guided) and for a student in each of --steps: the one given, else the teacher's own network sampled as a student
is, for weights do not change what a pass costs. All run on one clip after the other in turn, after one that does not
count; medians over clips, and ratios of the same clip's times. The points are those of one view of a built-in room at
the clip's size. peak_mb: what a process grows by from the loaded models to the peak of sampling and decoding, each way
in a process of its own (on a GPU: what torch allocates). Why: "more than 90 % faster" is the paper's claim (its section
5.2, which does not name the machine). --config gives teacher, data and steps where they are not given. Writes NAME.json
and .md, the paper's numbers beside; the last line is JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chain import room
from pages import page
from tables import Settings, bracket, commit, write_results
from verdicts import verdict

from fvgen.calls import existing, numbers
from fvgen.clips.clip import Clip
from fvgen.errors import UserError
from fvgen.metrics.intervals import paired
from fvgen.pipelines.folders import check_device, load_pipeline
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.reports.data import open_clips
from fvgen.reports.evaluate import Clock, Contestant, evaluate, few_step_teachers, teacher_contestant
from fvgen.system.command import Parser, guarded, positive
from fvgen.walks.render import render_walk

PAPER = [
    {"what": "16 frames of 320x512, section 5.2", "ViewCrafter": 13.2, "FVGen": "about 1", "ratio": "about 13"},
    {"what": "56 views of mip-360, Table 1", "ViewCrafter": 66.3, "FVGen": 5.1, "ratio": 13.0},
    {"what": "56 views of TNT, Table 1", "ViewCrafter": 65.9, "FVGen": 5.0, "ratio": 13.2},
]
CLAIM, CLAIMED_STEPS = 0.9, 4  # more than this part of the teacher's time is saved in so many steps
TEACHER, RENDER = "teacher", "render"
Seconds = dict[str, float]  # by part


def contestants_of(teacher: TeacherPipeline, student: StudentPipeline | None, steps: list[int]) -> dict:
    """By name, the teacher first; without a student, the teacher's network in its place."""
    found = {TEACHER: teacher_contestant(teacher)}
    for count in steps:
        few = Contestant(partial(student.sample, num_inference_steps=count), count, count) if student else None
        found[few_name(count)] = few or few_step_teachers(teacher, count)["renoise, plain"]
    return found


def few_name(steps: int) -> str:
    return f"student, {steps} step{'s' * (steps > 1)}"


def load(teacher: str, student: str | None, device: str) -> tuple[TeacherPipeline, StudentPipeline | None]:
    loaded = load_pipeline(teacher, TeacherPipeline).to(device)
    return loaded, load_pipeline(student, StudentPipeline).to(device) if student else None


# --- Seconds ---


def measure_seconds(
    contestants: dict[str, Contestant], clips: list[Clip], pipeline: TeacherPipeline
) -> dict[str, list[Seconds]]:
    """By contestant and clip, and of `RENDER`; the first clip, whose memory is new, is left out."""
    frames, _, height, width = clips[0].render.shape
    _, cloud, walk = room(0, frames, (height, width))
    times: dict[str, list[Seconds]] = {name: [] for name in (*contestants, RENDER)}
    for clip in clips:
        clock = Clock(torch.device("cpu"))
        render_walk(cloud, walk)
        times[RENDER].append({"render": clock.lap()})
        for name, result in evaluate(contestants, [clip], pipeline, 0).items():
            times[name] += result.seconds
    return {name: each[1:] for name, each in times.items()}


def row_of(name: str, nfe: int, seconds: list[Seconds], whole: list[float], frames: int) -> dict[str, Any]:
    """Medians over clips; ``whole``: the teacher's seconds of each."""
    sums = [sum(parts.values()) for parts in seconds]
    row: dict[str, Any] = {"model": name, "nfe": nfe}
    row |= {f"{part}_s": round(statistics.median(each[part] for each in seconds), 3) for part in seconds[0]}
    row |= {"clip_s": round(statistics.median(sums), 3), "frames_per_s": round(frames / statistics.median(sums), 2)}
    if "sample" in seconds[0]:
        row["teacher_over_this"] = round(statistics.median(a / b for a, b in zip(whole, sums, strict=True)), 2)
        shares = [each["sample"] / total for each, total in zip(seconds, sums, strict=True)]
        row["share_of_sampling"] = round(statistics.median(shares), 3)
    return row


def claim_of(whole: list[float], few: list[float]) -> dict[str, str]:
    """Whether few steps save more than the paper's share of the teacher's time, clip by clip."""
    saved = [1 - b / a for a, b in zip(whole, few, strict=True)]
    difference = paired(saved, [CLAIM] * len(saved))
    return {
        "claim": f"{CLAIMED_STEPS} steps save more than {100 * CLAIM:.0f} % of the teacher's time",
        "found here": verdict(difference, "saved"),
        "saved, minus that": bracket(difference, 4).strip(" ()"),
    }


# --- Memory ---


def peak_of(name: str, steps: list[int], given: dict[str, str | None], clip: Clip) -> float | None:
    """MB by which this process grows while it samples and decodes; None where the system does not tell."""
    from memory import resident

    device = torch.device(given["device"])
    teacher, student = load(given["teacher"], given["student"], given["device"])
    condition = teacher.condition(clip.render[None], torch.Generator().manual_seed(0))

    def run(contestant: Contestant) -> None:
        teacher.decode_latents(contestant.sample(condition, torch.Generator().manual_seed(0)))

    run(few_step_teachers(teacher, 1)["renoise, plain"])  # libraries load their kernels at the first use
    contestant = contestants_of(teacher, student, steps)[name]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(contestant)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now: proc(5)
    except OSError:
        return None
    before = resident("VmRSS")
    run(contestant)
    return (resident("VmHWM") - before) * 1e3


def measure_peaks(
    names: list[str], steps: list[int], given: dict[str, str | None], clip: Clip
) -> dict[str, int | None]:
    """`peak_of` of each in a process of its own, whose C library gives freed memory back at once."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    os.environ |= {name: os.environ.get(name, value) for name, value in at_once.items()}
    found = {}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_of, (name, steps, given, clip))
        found[name] = None if peak is None else round(peak)
    return found


# --- The command ---


def note(result: dict) -> str:
    """The result as a page of Markdown."""
    return page("Seconds of a clip", "speed.py", [], result)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--config", default="tiny", help="a file of benchmarks/configs, without its ending")
    parser.add_argument("--teacher", help="preset or model folder; else --config's")
    parser.add_argument("--student", help="a model folder; the teacher's network if not given")
    parser.add_argument("--data", help="shards with frames, clips, scenes, or builtin; else --config's")
    parser.add_argument("--clips", type=positive, default=5)
    parser.add_argument("--steps", type=positive, nargs="+", help="of the student; else --config's")
    parser.add_argument("--size", help="of clips made from scenes, HEIGHTxWIDTH")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prepared", default="runs/speed-clips", help="where scenes are prepared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where the files go")
    parser.add_argument("--name", help="of the files; speed-CONFIG if not given")
    args = parser.parse_args()
    config = Settings.read(args.config)
    data, steps = args.data or config.data, sorted(set(args.steps or config.few_steps))
    given = {"teacher": args.teacher or config.teacher, "student": args.student, "device": args.device}
    existing(data)
    check_device(args.device)
    size = numbers(args.size, "x", "size", "320x512") if args.size else None
    teacher, student = load(**given)
    found = open_clips(data, args.prepared, given["teacher"], size=size, device=args.device)
    if not len(found):
        raise UserError(f"{data} gives no clip to measure; name other data")
    clips = [found[index % len(found)] for index in range(args.clips + 1)]
    contestants = contestants_of(teacher, student, steps)
    times = measure_seconds(contestants, clips, teacher)
    whole = [sum(parts.values()) for parts in times[TEACHER]]
    nfe = {RENDER: 0} | {name: contestant.nfe for name, contestant in contestants.items()}
    rows = [row_of(name, nfe[name], seconds, whole, found.frames) for name, seconds in times.items()]
    peaks = measure_peaks(list(contestants), steps, given, clips[0])
    for row in rows:
        row["peak_mb"] = peaks.get(row["model"], "")
    cuda = torch.device(args.device).type == "cuda"
    cores = f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads"
    settings = {
        "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "commit": commit(),
        "hardware": torch.cuda.get_device_name() if cuda else cores,
        "torch": torch.__version__,
        "teacher": given["teacher"],
        "student": args.student or "the teacher's network",
        "clip": f"{found.frames} frames of {found.height}x{found.width}",
        "clips": args.clips,
    }
    few = times.get(few_name(CLAIMED_STEPS))
    claims = [claim_of(whole, [sum(parts.values()) for parts in few])] if few else []
    parts = {"seconds and memory": rows, "what the paper says": claims, "the paper's own seconds": PAPER}
    result = {"settings": settings, "parts": {name: each for name, each in parts.items() if each}}
    write_results(args.out, args.name or f"speed-{config.name}", result, note(result))
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
