"""The tiny preset on two devices: a few iterations of both stages, and clips of teacher and student.

    python benchmarks/devices.py [--device cuda] [--iterations 5] [--clips 2] [--steps 50] [--out FILE]

What is measured: losses of the first iteration and PSNR of the clips, on the CPU and on the device, with the same
random numbers (which are always a CPU's): they must agree within `BOUNDS`, and the seconds that each takes. Why: it is
the one check that a GPU computes the same training, and that all tensors meet on it. The bounds leave room for TF32, in
which torch convolves on a GPU (10 bits), and for AdamW, whose first steps turn roundings into signs. The last line is
JSON.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from fvgen import distill
from fvgen.clips.builtin import builtin_clips
from fvgen.pipelines.folders import check_device, load_pipeline
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.reports.evaluate import evaluate, score, student_contestant, teacher_contestant
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import write_json

# Of a loss of the first iteration, relative; of PSNR, dB. A GPU without TF32 is a hundred times nearer.
BOUNDS = {"loss": 0.03, "psnr": 0.3}


def measure(device: str, iterations: int, clips: int, steps: int, trained_on: int) -> dict[str, float]:
    """Losses by name, PSNR of teacher and student, seconds by part; ``trained_on`` so many clips."""
    if device == "cpu":  # many threads wait for each other at this size
        torch.set_num_threads(min(torch.get_num_threads(), 4))
    settings = distill.read_yaml(str(files("fvgen") / "configs" / "tiny.yaml"))
    quick = {"device": device, "clips": trained_on, "sample_every": 0, "track": False}
    for stage in ("gan", "dmd"):
        settings[stage] = settings[stage] | {"iterations": iterations}
    settings["gan"] |= {"head_warmup": 0}  # so few iterations leave no room for one
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        both = distill.run_config(settings | quick, folder)
        start = time.perf_counter()
        distill.run(both.gan)
        # Both from the teacher itself: where stage 1 ends is apart by what AdamW's first steps make of roundings, and a
        # relativistic loss multiplies that (8.8 % after five iterations).
        student_folder = distill.run(distill.changed(both.dmd, init=""))
        found["seconds of training"] = time.perf_counter() - start
        for stage, name in (("gan", "stage1_gan"), ("dmd", "stage2_dmd")):
            first = distill.read_metrics(Path(folder) / name)[0]
            found |= {f"{stage} {key}": value for key, value in first.items() if key.startswith("loss")}
        teacher = load_pipeline(settings["teacher"], TeacherPipeline).to(device)
        student = load_pipeline(student_folder, StudentPipeline).to(device)
    contestants = {"teacher": teacher_contestant(teacher, steps), "student": student_contestant(student)}
    data = builtin_clips("test", clips)
    shown = [data[index] for index in range(clips)]
    for name, result in evaluate(contestants, shown, teacher, seed=0).items():
        row = score(result, shown)
        found |= {f"{name} psnr": row["psnr"], f"seconds a clip of the {name}": row["seconds_per_clip"]}
    return found


def compare(cpu: dict[str, float], other: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row for each number, with its bound where it has one."""
    for name, value in cpu.items():
        row = {"what": name, "cpu": round(value, 5), "device": round(other[name], 5)}
        kind = next((kind for kind in BOUNDS if kind in name), None)
        if kind:
            difference = abs(other[name] - value) / (abs(value) if kind == "loss" else 1.0)
            row |= {"difference": round(difference, 6), "bound": BOUNDS[kind], "agrees": difference <= BOUNDS[kind]}
        yield row


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--iterations", type=positive, default=5)
    parser.add_argument("--clips", type=positive, default=2)
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--trained-on", type=positive, default=16, help="clips")
    parser.add_argument("--out")
    args = parser.parse_args()
    check_device(args.device)
    work = (args.iterations, args.clips, args.steps, args.trained_on)
    both = [measure(device, *work) for device in ("cpu", args.device)]
    result = {"device": args.device, "torch": torch.__version__, "rows": list(compare(*both))}
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
