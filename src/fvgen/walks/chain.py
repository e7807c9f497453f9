"""A long walk as a chain of clips that share their end views: the end frame of one, as it was generated, is a known
frame of the next. FVGen walks so from 5 photographs to 56 frames between them: four clips of 16 frames."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras
from fvgen.geometry.pointcloud import unproject
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.walks.render import Rendered

SEAMS = ("own_noise", "shared_noise", "overlap", "cloud")
SEAM = "overlap"  # the best of them: benchmarks/results/chain.json
OVERLAP = 4  # frames that two clips share where they are laid over each other


class Span(NamedTuple):
    """Frames start..stop-1 of the walk."""

    start: int
    stop: int


def spans(frames: int, clip: int, shared: int = 1) -> list[Span]:
    """Clips of ``clip`` frames over a walk, as few as will do, each sharing at least ``shared`` with the one before.

    Their starts are spread evenly, so that walks whose length is no whole number of clips overlap more instead of
    ending with a short clip; a walk shorter than a clip is one clip of its own length.
    """
    if frames <= clip:
        return [Span(0, frames)]
    count = math.ceil((frames - shared) / (clip - shared))
    starts = [round(k * (frames - clip) / (count - 1)) for k in range(count)]
    return [Span(start, start + clip) for start in starts]


def walk_spans(known: Tensor, clip: int, seams: str, overlap: int = OVERLAP) -> list[Span]:
    """The clips of a walk whose photographs are ``known`` [F]. Where every seam is a photograph none is to be seen, and
    nothing overlaps."""
    plain = spans(len(known), clip)
    if seams != "overlap" or all(known[span.start] for span in plain[1:]):
        return plain
    return spans(len(known), clip, min(overlap, clip - 1))


def seed_of(seed: int, number: int, seams: str) -> int:
    """Of a clip: the walk's own where noise is shared."""
    return seed if seams == "shared_noise" else seed + number


def clip_render(rendered: Rendered, span: Span, done: Tensor | None) -> Tensor:
    """[n, 3, H, W]: the clip's part of the renders; what ``done`` [start + shared, 3, H, W] has generated stands in
    for the first of its frames that is no photograph."""
    frames = rendered.frames[span.start : span.stop].clone()
    if done is not None and not rendered.known[span.start]:
        frames[0] = done[span.start]
    return frames


def joined(done: Tensor | None, clip: Tensor, span: Span, seams: str) -> Tensor:
    """The walk so far with one more clip. Frames of both are the earlier clip's, or fade from it to the later."""
    if done is None:
        return clip
    shared = len(done) - span.start
    if seams != "overlap" or shared < 2:
        return torch.cat([done, clip[shared:]])
    weight = torch.linspace(0, 1, shared).view(-1, 1, 1, 1)
    faded = torch.lerp(done[span.start :], clip[:shared], weight)
    return torch.cat([done[: span.start], faded, clip[shared:]])


class Made(NamedTuple):
    """A clip: ``video`` [n, 3, H, W] in [0, 1] on the CPU, and its scaled ``latents`` [1, C, F', h, w] where the model
    makes scenes of them."""

    video: Tensor
    latents: Tensor | None = None


def run_clip(pipeline: NovelViewPipeline, render: Tensor, cameras: Cameras, steps: int | None, seed: int) -> Made:
    """By as many steps as asked for or the model's own."""
    generator = torch.Generator().manual_seed(seed)
    guide = {"cameras": cameras} if pipeline.wants_cameras else {}
    latents = None
    if pipeline.lalrm is None:
        video = pipeline(render[None].to(pipeline.device), generator, steps, **guide)
    else:
        latents = pipeline(render[None].to(pipeline.device), generator, steps, output_type="latent", **guide).frames
        video = pipeline.decode_latents(latents)
    return Made(video[0, :, :3].float().cpu().clamp(0, 1).contiguous(), latents)


def new_points(rendered: Rendered, frame: int, image: Tensor) -> tuple[Tensor, Tensor]:
    """Points of a generated frame where the cloud showed nothing: at the depth of the nearest pixel with one."""
    from scipy.ndimage import distance_transform_edt

    depth = rendered.depth[frame]
    missing = depth <= 0
    if missing.all() or not missing.any():
        return torch.empty(0, 3), torch.empty(0, 3)
    _, (y, x) = distance_transform_edt(missing.numpy(), return_indices=True)
    near = depth[torch.from_numpy(y).long(), torch.from_numpy(x).long()]
    only = torch.where(missing, near, 0.0)
    return unproject(only[None], image[None], rendered.cameras[[frame]])


def chain(
    pipeline: NovelViewPipeline,
    rendered: Rendered,
    clip: int,
    steps: int | None = None,
    seed: int = 0,
    seams: str = SEAM,
    overlap: int = OVERLAP,
    render_again: Callable[[tuple[Tensor, Tensor]], Rendered] | None = None,
    kept: Callable[[int, Callable[[], Made]], Made] = lambda number, make: make(),
) -> Tensor:
    """The video [F, 3, H, W] of a walk.

    ``seams``: "own_noise": each clip its own; "shared_noise": all the same; "overlap": ``overlap`` frames are shared
    and faded; "cloud": what an end frame shows newly joins the points, and ``render_again`` (points) draws on.
    ``kept`` (number, make) may have a clip already.
    """
    done, extra = None, (torch.empty(0, 3), torch.empty(0, 3))
    for number, span in enumerate(walk_spans(rendered.known, clip, seams, overlap)):
        render, cameras = clip_render(rendered, span, done), rendered.cameras[span.start : span.stop]
        made = kept(number, lambda render=render, cameras=cameras, number=number: run_clip(
            pipeline, render, cameras, steps, seed_of(seed, number, seams)
        ))  # fmt: skip
        done = joined(done, made.video, span, seams)
        end = span.stop - 1
        if (
            seams == "cloud"
            and render_again is not None
            and not rendered.known[end]
            and span.stop < len(rendered.frames)
        ):
            new = new_points(rendered, end, done[end])
            extra = tuple(torch.cat(pair) for pair in zip(extra, new, strict=True))
            rendered = render_again(extra)
    return done
