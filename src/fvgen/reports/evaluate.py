"""Score models on clips: the same code for the demo and for benchmarks/quality.py.

Every contestant gets the same conditions and the same initial noise, clip by clip in turn, so that their times come
from the same minute of the same machine. Known frames are no novel views and are not scored.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from rich.progress import track
from torch import Tensor

from fvgen.clips.clip import Clip, shown_of
from fvgen.clips.latents import condition_of
from fvgen.diffusion.samplers import few_step
from fvgen.metrics import score_images
from fvgen.models.condition import Condition
from fvgen.models.denoiser import Teacher, frozen
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline

Sample = Callable[[Condition, torch.Generator], Tensor]
PARTS = ("encode", "sample", "decode")  # of what a user waits for


@dataclass(frozen=True)
class Contestant:
    """A way to make latents [1, C, F, h, w] from a condition; ``nfe`` counts network evaluations per clip."""

    sample: Sample
    steps: int
    nfe: int


@dataclass
class Result:
    """What a contestant made: one video [F, 3, H, W] per clip, and the seconds that it took by part, `PARTS`."""

    contestant: Contestant
    videos: list[Tensor] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)


def teacher_contestant(
    pipeline: TeacherPipeline,
    steps: int | None = None,
    guidance: float | None = None,
    camera_guidance: float | None = None,
) -> Contestant:
    """The teacher as published, all its steps, guided, unless told otherwise. Its null condition is that of now."""
    steps = steps or pipeline.config.steps
    with frozen(pipeline.network):
        teacher = pipeline.teacher(guidance, camera_guidance=camera_guidance)
    sample = partial(pipeline.sample, num_inference_steps=steps, teacher=teacher)
    return Contestant(sample, steps, steps * teacher.nfe)


def few_step_teachers(pipeline: TeacherPipeline, steps: int) -> dict[str, Contestant]:
    """The untrained teacher in as few steps as a student, in every usual way: what distillation has to beat.

    By the student's sampler (x0 and fresh noise, "renoise") and by DDIM with eta 0 and 1 as `TeacherPipeline` runs
    it, each with the teacher's own guidance and with none.
    """
    found: dict[str, Contestant] = {}
    ways = {"plain": 1.0} if pipeline.config.guidance == 1.0 else {"guided": pipeline.config.guidance, "plain": 1.0}
    for name, guidance in ways.items():
        with frozen(pipeline.network):
            teacher = pipeline.teacher(guidance)
        found[f"renoise, {name}"] = Contestant(
            partial(_few_steps, teacher, pipeline, steps), steps, steps * teacher.nfe
        )
        for eta in (0, 1):
            sample = partial(pipeline.sample, num_inference_steps=steps, teacher=teacher, eta=float(eta))
            found[f"DDIM eta {eta}, {name}"] = Contestant(sample, steps, steps * teacher.nfe)
    return found


def student_contestant(pipeline: StudentPipeline) -> Contestant:
    """A student in its own number of steps."""
    return Contestant(pipeline.sample, pipeline.config.steps, pipeline.config.steps)


def evaluate(
    contestants: dict[str, Contestant], clips: Sequence[Clip], pipeline: NovelViewPipeline, seed: int
) -> dict[str, Result]:
    """Run every contestant on every clip. ``pipeline`` encodes and decodes for all of them.

    The condition's posterior sample and what samplers draw come from streams of their own, made of (seed, place of the
    clip): one stream for both would begin with the same numbers in two places.
    """
    results = {name: Result(contestant) for name, contestant in contestants.items()}
    for index, clip in enumerate(track(clips, "evaluation")):
        clock = Clock(pipeline.device)
        condition = condition_of(clip, pipeline, _generator(seed, index, "condition"))
        encode = clock.lap()
        for result in results.values():
            clock = Clock(pipeline.device)
            latents = result.contestant.sample(condition, _generator(seed, index, "sample"))
            sample = clock.lap()
            video = pipeline.decode_latents(latents)[0].cpu()
            result.seconds.append({"encode": encode, "sample": sample, "decode": clock.lap()})
            result.videos.append(video)
    return results


class Clock:
    """Seconds on a device, whose work is waited for: whoever began it pays for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        wait_for(device)
        self.start = time.perf_counter()

    def lap(self) -> float:
        """Since the last lap."""
        wait_for(self.device)
        before, self.start = self.start, time.perf_counter()
        return self.start - before


def wait_for(device: torch.device) -> None:
    """Until everything that was asked of it is done; a CPU does it at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def score(result: Result, clips: Sequence[Clip]) -> dict[str, object]:
    """A row of the report: steps, nfe, median seconds per clip, in all and by part, and every metric over the novel
    views."""
    row: dict[str, object] = {"steps": result.contestant.steps, "nfe": result.contestant.nfe}
    row["seconds_per_clip"] = statistics.median(sum(parts.values()) for parts in result.seconds)
    for part in PARTS:
        row[f"{part}_seconds"] = statistics.median(parts[part] for parts in result.seconds)
    return row | score_videos(result.videos, clips)


def score_renders(clips: Sequence[Clip]) -> dict[str, object]:
    """The row of the raw point renders; rendering belongs to the preparation, so it has no seconds."""
    row: dict[str, object] = {"steps": 0, "nfe": 0, "seconds_per_clip": None}
    row |= {f"{part}_seconds": None for part in PARTS}
    return row | score_videos([clip.render for clip in clips], clips)


def score_videos(videos: Sequence[Tensor], clips: Sequence[Clip]) -> dict[str, object]:
    """All metrics of videos [F, 3, H, W] against the truth of ``clips``, over the frames that are not known, where
    masks show them; also by clip."""
    predicted = torch.cat([video[~clip.known] for video, clip in zip(videos, clips, strict=True)])
    truth = torch.cat([clip.truth[~clip.known] for clip in clips])
    masked = any(clip.shown is not None for clip in clips)
    shown = torch.cat([shown_of(c)[~c.known] for c in clips]) if masked else None
    clip_of = torch.cat([torch.full((int((~c.known).sum()),), index) for index, c in enumerate(clips)])
    return score_images(predicted, truth, shown, clip_of)


def better(a: dict, b: dict) -> bool:
    """Whether row ``a`` beats row ``b``: by LPIPS where it could be measured, else by PSNR."""
    if a["lpips"] is not None and b["lpips"] is not None:
        return a["lpips"] < b["lpips"]
    return (a["psnr"] or 0) > (b["psnr"] or 0)


def best(rows: dict[str, dict]) -> str:
    """The name of the row that no other beats (`better`), the first of equals."""
    winner, *others = rows
    for name in others:
        winner = name if better(rows[name], rows[winner]) else winner
    return winner


def _few_steps(
    teacher: Teacher, pipeline: NovelViewPipeline, steps: int, condition: Condition, generator: torch.Generator
) -> Tensor:
    noise = pipeline.initial_noise(condition, generator)
    with torch.no_grad(), frozen(teacher.network):
        denoiser = partial(teacher, condition=condition)
        return few_step(denoiser, noise, pipeline.schedule, steps, generator=generator)


def _generator(seed: int, index: int, purpose: str) -> torch.Generator:
    digest = hashlib.sha256(f"fvgen evaluate {seed} {index} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
