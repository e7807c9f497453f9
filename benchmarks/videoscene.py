"""VideoScene's claims on the proving ground: one evaluation from a closed render, against everything that it must beat.

    python benchmarks/videoscene.py --teacher DIR [--seeds 0 1 2] [--iterations 300] [--train 256] [--clips 32]
        [--first 16] [--data builtin-coarse] [--t 459] [--k 50] [--rate 2e-4] [--device cuda] [--work DIR]
        [--lpips 0] [--name NAME] [--teacher-only]

What is measured: novel frames of clips of the teacher's length whose renders are closed (`builtin-closed`: exact in
detail, 5 % wrong in depth; `builtin-coarse`: closed from 3 to 10 % of the points; `builtin-rough`: from .5 to 1 %, 5 to
10 % wrong in depth), against the truth. Rows: the render; the render through the VAE; the teacher's DDIM from pure
noise and, from the noised render, from the student's own t (the ceiling of a leap); one evaluation from pure noise and
from the leap, each undistilled and distilled; the distilled leap at the best constant t, chosen on the training clips;
the same by DDPNet. Every seed trains a student with `method: leap` from the render (T' = 599), one of the same settings
from noise (T' = 999 and the truth) and, of the first, a policy. Differences are paired by seed; an ordering that the
paper reports is called reproduced, not reproduced or undecided. Geometry: matches between frames four apart (SIFT at
four times the size) and their Sampson distance to the true cameras' epipolar geometry; the paper counts matches that a
fitted matrix keeps.

--teacher-only prints the rows that need no student: a teacher that is no better than its prior has nothing to give.
recipes/train_cogvideox_world.py makes one. Interrupted, the same command goes on. Writes
benchmarks/results/NAME.json and .md; the last line is JSON.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pages import page
from tables import Claim, cell, claim_row, claim_table, commit, write_results
from torch import Tensor

from fvgen import distill
from fvgen.clips.builtin import DATA_SEED, HEIGHT, WIDTH
from fvgen.clips.clip import Clip
from fvgen.clips.folder import save_clips
from fvgen.clips.rooms import synthetic_clip
from fvgen.clips.worlds import WORLDS
from fvgen.diffusion.consistency import leap_grid
from fvgen.diffusion.samplers import ddim
from fvgen.distill.policy import refit
from fvgen.metrics.consistency import match_distance
from fvgen.models.condition import Condition
from fvgen.models.denoiser import frozen
from fvgen.pipelines.folders import check_device, load_pipeline
from fvgen.pipelines.leap import LeapPipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.reports.evaluate import Contestant, evaluate, score, score_renders, teacher_contestant
from fvgen.system.command import Parser, guarded, positive
from fvgen.system.files import write_json

APART, ENLARGED, RATIO, NEAR = 4, 4, 0.8, 1.0  # frames, times, of SIFT's two best matches, pixels
METRICS = ("psnr", "ssim", "lpips", "kid_squeeze", "fid")
NOISE, LEAP = "one step from noise", "one step from the leap"
CEILING, DDPNET, CONSTANT = "teacher, DDIM from the leap's t", "DDPNet", "best constant t"
CLAIMS = (  # (better, worse): the paper's tables 1 and 3, and what the leap must beat to be worth its name
    (f"{LEAP}, distilled", "render"),
    (f"{LEAP}, distilled", f"{LEAP}, undistilled"),
    (f"{LEAP}, distilled", f"{NOISE}, distilled"),
    (f"{LEAP}, {DDPNET}", f"{LEAP}, {CONSTANT}"),
    (f"{LEAP}, {DDPNET}", f"{NOISE}, distilled"),
    (f"{LEAP}, {DDPNET}", "render"),
)
PAPER = [
    {"table": table, "row": row, "FVD": fvd, "aesthetic": aesthetic, "subject": subject, "background": background}
    for table, row, fvd, aesthetic, subject, background in (
        (1, "SVD, 50 steps", 424.68, 0.4906, 0.9305, 0.9287),
        (1, "SVD, 1 step", 1220.80, 0.2981, 0.7934, 0.8817),
        (1, "DynamiCrafter, 50 steps", 458.27, 0.5336, 0.8898, 0.9349),
        (1, "DynamiCrafter, 1 step", 846.85, 0.3737, 0.7474, 0.8627),
        (1, "CogVideoX-5B, 50 steps", 521.04, 0.5368, 0.9179, 0.9460),
        (1, "CogVideoX-5B, 1 step", 753.02, 0.3987, 0.7842, 0.8976),
        (1, "VideoScene, 50 steps", 98.67, 0.5570, 0.9320, 0.9407),
        (1, "VideoScene, 4 steps", 175.84, 0.5357, 0.9269, 0.9431),
        (1, "VideoScene, 1 step", 103.42, 0.5416, 0.9259, 0.9461),
        (3, "base render", 171.38, 0.4769, 0.8794, 0.9240),
        (3, "without leap", 543.53, 0.4092, 0.7842, 0.9160),
        (3, "without DDPNet", 106.28, 0.4897, 0.8850, 0.9205),
        (3, "full", 97.53, 0.5306, 0.9139, 0.9440),
    )
]


# --- Clips and students ---


def clips_of(world: str, split: str, indices: range, frames: int) -> list[Clip]:
    return [synthetic_clip(split, DATA_SEED, index, frames, HEIGHT, WIDTH, WORLDS[world]) for index in indices]


def training_clips(args: Any, frames: int) -> Path:
    """A folder of clips, made once."""
    folder = args.work / f"train-{args.data}-{frames}-{args.train}"
    if not (folder / "index.json").is_file():
        save_clips(folder, clips_of(args.data, "train", range(args.train), frames), {"kind": args.data})
    return folder


def train(name: str, words: Mapping[str, Any], args: Any, seed: int, data: Path) -> Path:
    """The folder of a finished stage."""
    out = args.work / f"{name}-{seed}"
    settings = {
        "out": str(out), "teacher": str(args.teacher), "data": str(data), "seed": seed, "device": args.device,
        "iterations": args.iterations, "batch_size": args.batch, "student_lr": args.rate, "k": args.k,
        "huber_c": args.huber_c, "trained": args.trained, "sample_every": 0, "track": False,
    }  # fmt: skip
    distill.run(distill.stage_config("leap", settings | words))
    return out


# --- Rows ---


@torch.no_grad()
def from_the_leap(
    teacher: Any, pipeline: TeacherPipeline, t: int, k: int, condition: Condition, generator: torch.Generator
) -> Tensor:
    """The teacher's DDIM in steps of k from the noised render at t: what a leap is distilled towards."""
    schedule = pipeline.schedule
    start = pipeline.family.start(condition)
    x_t = schedule.add_noise(start, pipeline.initial_noise(condition, generator), t)
    grid = [step for step in leap_grid(k, t) if step < t] + [t]
    with frozen(teacher.network):
        return ddim(partial(teacher, condition=condition), x_t, schedule, grid, denoise_last=True)


@torch.no_grad()
def one_step(
    teacher: Any, pipeline: TeacherPipeline, t: int, condition: Condition, generator: torch.Generator
) -> Tensor:
    """The teacher's clean estimate at t of the noised render (999: of pure noise)."""
    x_t = pipeline.schedule.add_noise(pipeline.family.start(condition), pipeline.initial_noise(condition, generator), t)
    with frozen(teacher.network):
        return teacher(x_t, torch.full((len(x_t),), t, device=x_t.device), condition)


def teacher_rows(args: Any, clips: Sequence[Clip], seed: int) -> dict[str, dict[str, Any]]:
    """All that needs no student, and the render."""
    pipeline = load_pipeline(args.teacher, TeacherPipeline).to(args.device)
    with frozen(pipeline.network):
        teacher = pipeline.teacher(1.0)
    steps = len([step for step in leap_grid(args.ddim_k, args.t) if step < args.t]) + 1
    contestants = {
        "teacher, all its steps from noise": teacher_contestant(pipeline),
        CEILING: Contestant(partial(from_the_leap, teacher, pipeline, args.t, args.ddim_k), steps, steps),
        f"{NOISE}, undistilled": Contestant(partial(one_step, teacher, pipeline, 999), 1, 1),
        f"{LEAP}, undistilled": Contestant(partial(one_step, teacher, pipeline, args.t), 1, 1),
    }
    through = Contestant(lambda condition, generator: pipeline.family.start(condition), 0, 0)
    results = evaluate({"render through the VAE": through} | contestants, clips, pipeline, seed)
    found = {"render": score_renders(clips) | geometry([clip.render for clip in clips], clips)}
    found["truth"] = {"steps": 0, "nfe": 0} | geometry([clip.truth for clip in clips], clips)
    found |= {name: score(result, clips) | geometry(result.videos, clips) for name, result in results.items()}
    return found


def student_rows(args: Any, clips: Sequence[Clip], seed: int, data: Path) -> dict[str, dict[str, Any]]:
    """Train, and score what came of it."""
    leap = train("leap", {"t": args.t, "t_max": 599, "start": args.start}, args, seed, data)
    noise = train("noise", {"t": 999, "t_max": 999, "start": "truth"}, args, seed, data)
    policy = leap / "policy"
    if not (policy / "policy.json").is_file():
        refit(leap, str(data), policy, clips=args.train, lpips_weight=args.lpips, device=args.device)
    report = json.loads((policy / "policy.json").read_text())
    found: dict[str, dict[str, Any]] = {}
    rows = {
        f"{LEAP}, distilled": (leap / "student", args.t),
        f"{LEAP}, {CONSTANT}": (leap / "student", report["best_constant"]),
        f"{LEAP}, {DDPNET}": (policy, None),
        f"{NOISE}, distilled": (noise / "student", 999),
    }
    for name, (folder, t) in rows.items():
        pipeline = load_pipeline(folder, LeapPipeline).to(args.device)
        pipeline.set_progress_bar_config(disable=True)
        contestant = Contestant(partial(pipeline.sample, t=t), 1, 1)
        result = evaluate({name: contestant}, clips, pipeline, seed)[name]
        found[name] = score(result, clips) | geometry(result.videos, clips) | {"t": t}
    found[f"{LEAP}, {DDPNET}"]["policy"] = report
    return found


def geometry(videos: Sequence[Tensor], clips: Sequence[Clip]) -> dict[str, float | None]:
    """Matches a pair of frames, and the share of them that the true cameras allow to a pixel."""
    try:
        import cv2
    except ImportError:
        return {"matches": None, "consistent": None}
    sift, counts, near = cv2.SIFT_create(), [], []
    for video, clip in zip(videos, clips, strict=True):
        found = []
        for frame in video:
            grey = (frame.mean(0).clamp(0, 1) * 255).byte().cpu().numpy()
            height, width = grey.shape
            grey = cv2.resize(grey, (ENLARGED * width, ENLARGED * height), interpolation=cv2.INTER_CUBIC)
            found.append(sift.detectAndCompute(grey, None))
        for first in range(len(video) - APART):
            second = first + APART
            (a, of_a), (b, of_b) = found[first], found[second]
            if of_a is None or of_b is None or len(a) < 2 or len(b) < 2:
                counts.append(0)
                continue
            pairs = [p for p in cv2.BFMatcher().knnMatch(of_a, of_b, k=2) if p[0].distance < RATIO * p[1].distance]
            counts.append(len(pairs))
            if pairs:
                points = [[key[m.queryIdx if key is a else m.trainIdx].pt for m, _ in pairs] for key in (a, b)]
                pixels = [torch.tensor(x, dtype=torch.float64) / ENLARGED for x in points]
                near += (match_distance(*pixels, clip.cameras, first, second) < NEAR).tolist()
    return {"matches": statistics.mean(counts), "consistent": statistics.mean(near) if near else None}


# --- The page ---


def summary(by_seed: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Means over seeds by row, and the claims."""
    rows: dict[str, dict[str, Any]] = {}
    for name in by_seed[0]:
        row: dict[str, Any] = {"nfe": by_seed[0][name].get("nfe")}
        for metric in (*METRICS, "matches", "consistent", "seconds_per_clip"):
            values = [seed[name].get(metric) for seed in by_seed]
            row[metric] = None if None in values else statistics.mean(values)
        rows[name] = row
    each = {name: [seed[name] for seed in by_seed] for name in rows}
    judged = [Claim(*pair, metric) for pair in CLAIMS if each.keys() >= {*pair} for metric in ("lpips", "kid_squeeze")]
    return {"rows": rows, "claims": [claim_row(claim, each) for claim in judged]}


def markdown(found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    digits = {"psnr": 2, "ssim": 3, "lpips": 4, "kid_squeeze": 3, "fid": 1, "matches": 1, "consistent": 3}
    table = [
        {"": name, "NFE": cell(row["nfe"], 0)}
        | {metric: cell(row[metric], places) for metric, places in digits.items()}
        | {"s a clip": cell(row["seconds_per_clip"], 3)}
        for name, row in found["rows"].items()
    ]
    claims = claim_table(found["claims"])
    remarks = ["Means over seeds. A claim's difference is paired by seed, with its 95 % interval."]
    parts = {"rows": table, "what the paper says": claims, "its own numbers, at full size on RealEstate10K": PAPER}
    parts = {name: rows for name, rows in parts.items() if rows}  # no claims where no student was trained
    return page("VideoScene on the proving ground", "videoscene.py", remarks, {"settings": settings, "parts": parts})


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--teacher", type=Path, required=True, help="folder of a teacher whose condition has the render"
    )
    parser.add_argument("--teacher-only", action="store_true", help="no students")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=positive, default=300)
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--trained", default="", help="see the setting; '' is all layers")
    parser.add_argument(
        "--start", default="render", choices=["render", "truth", "mixed"], help="of the leap's training"
    )
    parser.add_argument("--huber-c", type=float, default=0.03)
    parser.add_argument("--k", type=positive, default=50, help="of the student's grid")
    parser.add_argument("--ddim-k", type=positive, default=20, help="of the ceiling's steps")
    parser.add_argument("--t", type=positive, default=459, help="where the student lands, but for chosen t")
    parser.add_argument("--lpips", type=float, default=0.0, help="weight of LPIPS in what an arm earns")
    parser.add_argument(
        "--data", default="builtin-closed", choices=["builtin-closed", "builtin-coarse", "builtin-rough"]
    )
    parser.add_argument("--train", type=positive, default=256, help="clips to learn from")
    parser.add_argument("--clips", type=positive, default=32, help="clips to score")
    parser.add_argument("--first", type=int, default=16, help="the first of them: earlier ones chose settings")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/videoscene"))
    parser.add_argument("--name", default="videoscene-tiny")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    check_device(args.device)
    frames = load_pipeline(args.teacher, TeacherPipeline).frames
    args.work.mkdir(parents=True, exist_ok=True)
    clips = clips_of(args.data, "test", range(args.first, args.first + args.clips), frames)
    by_seed = []
    for seed in args.seeds:
        file = args.work / f"rows-{seed}{'-teacher' if args.teacher_only else ''}.json"
        if not file.is_file():
            rows = teacher_rows(args, clips, seed)
            if not args.teacher_only:
                rows |= student_rows(args, clips, seed, training_clips(args, frames))
            write_json(file, rows)
        by_seed.append(json.loads(file.read_text()))
        print(time.strftime("%H:%M:%S"), f"seed {seed}", flush=True)
    found = summary(by_seed)
    for name, row in found["rows"].items():
        print(f"{name:36s} " + " ".join(f"{metric} {cell(row[metric], 4)}" for metric in METRICS))
    settings = {
        "commit": commit(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {args.device}",
        "teacher": args.teacher.name,
        "data": f"{args.data}, test clips {args.first} to {args.first + args.clips - 1}, {args.train} to learn from",
        "training": f"{args.iterations} iterations of {args.batch} clips, rate {args.rate:g}, k {args.k}, t {args.t}, "
        f"start {args.start}, huber_c {args.huber_c:g}; LPIPS weighs {args.lpips:g} in what an arm earns",
        "seeds": args.seeds,
    }
    write_results(
        args.out, args.name, {**settings, **found, "paper": PAPER, "by_seed": by_seed}, markdown(found, settings)
    )
    print(json.dumps({"rows": found["rows"], "claims": found["claims"]}))


if __name__ == "__main__":
    guarded(main)
