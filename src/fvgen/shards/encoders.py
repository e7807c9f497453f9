"""What shards need of a teacher: its encoders, without the network that takes most of the memory, and its wishes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fvgen.clips.builtin import HEIGHT, WIDTH
from fvgen.errors import UserError
from fvgen.geometry.pointcloud import point_radius
from fvgen.models.viewcrafter.pipelines import FVGenPipeline, ViewCrafterPipeline
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.pipelines.folders import DAMAGE, damaged, load_pipeline, model_folder, model_kind

SIZE = (320, 512)  # of published models

Encoding = ViewCrafterPipeline | FVGenPipeline  # a student has its teacher's encoders


class RenderNeeds(NamedTuple):
    """What clips for a model are like: height and width of a frame, number of frames, radius of a point in normalised
    device units, and whether points are half a pixel off (`unproject`)."""

    frames: int
    height: int
    width: int
    radius: float
    half_pixel_shift: bool


def render_needs(
    pipeline: Encoding, frames: int | None, size: tuple[int, int] | None, half_pixel_shift: bool | None
) -> RenderNeeds:
    """The one place that decides what renders a model wants where the user does not say.

    Published ViewCrafter models, and students of them, were trained at 320x512 on renders with the shift; the tiny ones
    at 48x64 without it. Raises UserError for a size that the model cannot take.
    """
    published = pipeline.config.image_resize == "viewcrafter"
    height, width = size or (SIZE if published else (HEIGHT, WIDTH))
    if min(height, width) < 1:
        raise UserError(f"size {height}x{width} is too small; give, for example, 320x512")
    pipeline.check_size(height, width)
    frames = pipeline.unet.config.temporal_length if frames is None else frames
    shift = published if half_pixel_shift is None else half_pixel_shift
    return RenderNeeds(frames, height, width, point_radius(height, width), shift)


def load_encoders(name: str | Path) -> Encoding:
    """A teacher or student whose network has settings and shapes (it is on torch's device "meta") but no weights.

    Raises UserError for a folder that is none or damaged.
    """
    folder = model_folder(name)
    kind = FVGenPipeline if model_kind(folder) == "FVGenPipeline" else ViewCrafterPipeline
    try:
        with torch.device("meta"):
            unet = ViewCrafterUNet.from_config(ViewCrafterUNet.load_config(folder / "unet", local_files_only=True))
    except DAMAGE as error:
        raise damaged(folder, error) from error
    return load_pipeline(folder, kind, unet=unet)


def placed(pipeline: Encoding, device: str) -> Encoding:
    """The same on a device, now without any network."""
    pipeline.register_modules(unet=None)
    return pipeline.to(device)


@cache
def encoders(name: str, device: str) -> Encoding:
    """Those of a worker, for all of its shards."""
    return placed(load_encoders(name), device)
