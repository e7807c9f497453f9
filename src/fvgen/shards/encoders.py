"""What shards need of a teacher: its encoders, without the network that takes most of the memory, and its wishes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fvgen.errors import UserError
from fvgen.geometry import closing
from fvgen.geometry.pointcloud import point_radius
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.pipelines.folders import folder_blueprint, load_pipeline, model_kind
from fvgen.pipelines.presets import model_folder


class RenderNeeds(NamedTuple):
    """What clips for a model are like: height and width of a frame, number of frames, radius of a point in normalised
    device units, whether points are half a pixel off (`unproject`), and whether renders are closed
    (`fvgen.geometry.closing`)."""

    frames: int
    height: int
    width: int
    radius: float
    half_pixel_shift: bool
    closed: bool = False


def render_needs(
    pipeline: NovelViewPipeline,
    frames: int | None,
    size: tuple[int, int] | None,
    half_pixel_shift: bool | None,
    closed: bool | None = None,
) -> RenderNeeds:
    """The one place that decides what renders a model wants where the user does not say.

    Its own size, number of frames and half-pixel shift are those that it was trained with. Raises UserError for clips
    that the model cannot take.
    """
    height, width = size or pipeline.frame_size
    if min(height, width) < 1:
        raise UserError(f"size {height}x{width} is too small; give, for example, 320x512")
    frames = pipeline.frames if frames is None else frames
    pipeline.check_clip(frames, height, width)
    shift = pipeline.half_pixel_shift if half_pixel_shift is None else half_pixel_shift
    closed = pipeline.closed_renders if closed is None else closed
    radius = point_radius(height, width) * (closing.RADIUS if closed else 1.0)
    return RenderNeeds(frames, height, width, radius, shift, closed)


def load_encoders(name: str | Path) -> NovelViewPipeline:
    """A teacher or student whose network has settings and shapes (it is on torch's device "meta") but no weights.

    Raises UserError for a folder that is none or damaged.
    """
    folder = model_folder(name)
    family, blueprint = folder_blueprint(folder)
    with torch.device("meta"):
        network = blueprint.network()
    kind = family.pipeline(model_kind(folder))
    return load_pipeline(folder, kind, **{kind.network_part: network})


def placed(pipeline: NovelViewPipeline, device: str) -> NovelViewPipeline:
    """The same on a device, now without any network."""
    pipeline.register_modules(**{pipeline.network_part: None})
    return pipeline.to(device)


@cache
def encoders(name: str, device: str) -> NovelViewPipeline:
    """Those of a worker, for all of its shards."""
    return placed(load_encoders(name), device)
