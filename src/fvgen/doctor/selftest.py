"""A pipeline from end to end: the tiny teacher samples one built-in clip, and what comes out is judged."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from fvgen.clips.builtin import DATA_SEED, FRAMES, HEIGHT, WIDTH
from fvgen.clips.clip import Clip
from fvgen.clips.rooms import synthetic_clip
from fvgen.errors import UserError
from fvgen.metrics.image import psnr
from fvgen.pipelines.folders import check_device, load_pipeline
from fvgen.pipelines.teacher import TeacherPipeline

STEPS, CLIP = 4, 1  # of the held-out ones the first that is far from one colour


def self_test(device: str = "cpu", model: str | Path = "tiny") -> dict[str, Any]:
    """Sample ``STEPS`` steps of the tiny preset's size: ``device``, ``shape`` [F, 3, H, W], ``psnr`` of the new views
    and ``render_psnr`` of what the model was given, dB, and ``seconds``.

    Raises UserError for a model or device that cannot be used, and for a video that is wrong: of another shape, not
    finite, out of [0, 1], or no nearer to the true views than what needs no model: the render with its holes, or each
    view's mean colour.
    """
    start = time.perf_counter()
    check_device(device)
    pipeline = load_pipeline(model, TeacherPipeline).to(device)
    pipeline.set_progress_bar_config(disable=True)
    clip = synthetic_clip("test", DATA_SEED, CLIP, FRAMES, HEIGHT, WIDTH)
    generator = torch.Generator().manual_seed(0)
    video = pipeline(clip.render[None], generator=generator, num_inference_steps=STEPS)[0].float().cpu()
    found = judged(video, clip)
    return {"device": device, "shape": list(video.shape), **found, "seconds": round(time.perf_counter() - start, 1)}


def judged(video: torch.Tensor, clip: Clip) -> dict[str, float]:
    """PSNR of the new views of a video [F, 3, H, W] and of its render. Raises UserError as `self_test` does."""
    if video.shape != clip.truth.shape:
        raise UserError(f"the video has the shape {list(video.shape)}, not {list(clip.truth.shape)}")
    if not video.isfinite().all():
        raise UserError("the video holds NaN or infinite values")
    if video.min() < 0 or video.max() > 1:
        raise UserError("the video leaves the range of 0 to 1")
    new = ~clip.known
    plain = clip.truth.mean(dim=(2, 3), keepdim=True).expand_as(clip.truth)
    made, given, flat = (psnr(x[new], clip.truth[new]).mean().item() for x in (video, clip.render, plain))
    if made <= max(given, flat):
        said = f"{made:.2f} dB PSNR, the render {given:.2f}, one colour {flat:.2f}"
        raise UserError(f"the video is no better than what needs no model ({said})")
    return {"psnr": round(made, 2), "render_psnr": round(given, 2)}
