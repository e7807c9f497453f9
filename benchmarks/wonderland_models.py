"""The trained rows of benchmarks/wonderland.py: what trains them, and what is asked of what came of it.

Everything that names a setting of `method: camera` or `method: lalrm` is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen import distill
from fvgen.clips.clip import Clip
from fvgen.clips.folder import save_clips
from fvgen.clips.latents import condition_of
from fvgen.pipelines.folders import load_pipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.reports.evaluate import evaluate, teacher_contestant
from fvgen.splats.raymap import reconstructed

LALRM = {"clip_norm": 1.0, "lr_warmup": 100, "own_weight": 1.0, "depth_weight": 0.1}  # rows may say otherwise
SHARE = "control_share"  # of the base's blocks that are copied; in a row's settings, not in the method's


def camera_settings(words: Mapping[str, Any], args: Any, layers: int) -> dict[str, Any]:
    """Settings of `method: camera` from a row's, whose `SHARE` is of ``layers`` blocks, at least one."""
    found = {"encoder_width": args.encoder_width, **words}
    if words["branch"] != "control":
        found.setdefault("camera_lora_rank", args.lora_rank)
    if words["branch"] != "lora":
        found["control_blocks"] = max(1, round(found.pop(SHARE, 0.5) * layers))
    return found


def lalrm_settings(words: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """Settings of `method: lalrm` from a row's."""
    sizes = {"width": args.width, "layers": args.layers, "head_dim": 32, "planes": args.planes}
    rates = {"lalrm_lr": args.lalrm_rate, "batch_size": args.lalrm_batch, "own_iterations": args.own_iterations}
    unseen = words.get("unseen_views", args.views)
    views = {"unseen_views": unseen, "seen_views": 2 * args.views - unseen, "others": args.others}
    return {**LALRM, **sizes, **rates, **views, "perceptual_weight": args.perceptual, **words}


def common(args: Any, out: Path, seed: int) -> dict[str, Any]:
    """What every training is told."""
    return {
        "out": str(out), "teacher": str(args.teacher), "data": str(args.folder or args.data), "clips": args.train,
        "seed": seed, "device": args.device, "batch_size": args.batch, "sample_every": 0, "track": False,
    }  # fmt: skip


def train_camera(words: Mapping[str, Any], args: Any, out: Path, seed: int) -> Path:
    """The folder of a teacher that is guided by cameras; one that is there is taken."""
    layers = load_pipeline(args.teacher, TeacherPipeline).network.config.num_layers
    settings = camera_settings(words, args, layers) | {"iterations": args.iterations, "student_lr": args.rate}
    return distill.run(distill.stage_config("camera", common(args, out, seed) | settings))


def train_lalrm(words: Mapping[str, Any], args: Any, out: Path, seed: int) -> Path:
    """The folder of a teacher that holds a LaLRM; one that is there is taken."""
    settings = lalrm_settings(words, args) | {"iterations": args.lalrm_iterations}
    return distill.run(distill.stage_config("lalrm", common(args, out, seed) | settings))


def train_lalrm_further(
    start: Path, words: Mapping[str, Any], generated: Path, args: Any, out: Path, seed: int
) -> Path:
    """The paper's second stage: ``start`` goes on, at a tenth of the rate, with a folder of `generated_clips`, whose
    only views are their own frames."""
    settings = lalrm_settings(words, args) | {"iterations": args.stage2_iterations, "unseen_views": 0}
    settings |= {"own_iterations": 0, "lr_warmup": args.stage2_iterations // 3, "lalrm_lr": args.lalrm_rate / 10}
    sources = {"teacher": str(start), "data": str(generated), "clips": args.generated}
    return distill.run(distill.stage_config("lalrm", common(args, out, seed) | settings | sources))


def guided_videos(folder: Path, clips: Sequence[Clip], args: Any, seed: int, weight: float = 1.0) -> list[Tensor]:
    """A video [F, 3, H, W] along each clip's path from its first frame, on the CPU; without the path where the model
    does not look at cameras. ``weight``: the path's, `fvgen.models.denoiser.Teacher`."""
    pipeline = load_pipeline(folder, TeacherPipeline).to(args.device)
    contestant = teacher_contestant(pipeline, args.steps, camera_guidance=weight)
    return evaluate({"": contestant}, clips, pipeline, seed)[""].videos


def shuffled(clips: Sequence[Clip]) -> list[Clip]:
    """The clips, each with the next one's path."""
    return [replace(a, cameras=b.cameras) for a, b in zip(clips, [*clips[1:], clips[0]], strict=True)]


def generated_clips(folder: Path, clips: Sequence[Clip], args: Any, seed: int, out: Path, weight: float = 1.0) -> Path:
    """A folder of clips that a guided model made of the first frames of ``clips``, along their paths; made once."""
    if not (out / "index.json").is_file():
        videos = guided_videos(folder, clips, args, seed, weight)
        made = [replace(c, truth=v, render=v, others=None) for c, v in zip(clips, videos, strict=True)]
        save_clips(out, made, {"kind": "generated"})
    return out


@torch.no_grad()
def guided_latents(pipeline: TeacherPipeline, clip: Clip, args: Any, seed: int, weight: float = 1.0) -> Tensor:
    """[1, C, F', h, w], scaled: what the model makes of a clip's first frame and path, of that ``weight``."""
    generator = torch.Generator().manual_seed(seed)
    condition = condition_of(clip, pipeline, generator)
    return teacher_contestant(pipeline, args.steps, camera_guidance=weight).sample(condition, generator)


@torch.no_grad()
def true_latents(pipeline: TeacherPipeline, clip: Clip, seed: int) -> Tensor:
    """The same of the clip's true frames."""
    return pipeline.encode_frames(clip.truth[None], torch.Generator().manual_seed(seed))


def gaussians_of(pipeline: TeacherPipeline, latents: Tensor, clip: Clip) -> Any:
    """By the pipeline's LaLRM, in the clip's own world."""
    return reconstructed(pipeline.lalrm, latents, clip.cameras)
