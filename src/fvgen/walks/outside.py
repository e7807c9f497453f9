"""Renders that other programs made (MVSplat's, NoPoSplat's): read from disk, for a leap to start from."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fvgen.errors import UserError
from fvgen.reports.frames import open_frames


def read_render(place: str | Path, frames: int, height: int, width: int) -> Tensor:
    """[F, 3, H, W] in [0, 1] of a video or a folder of pictures.

    Of more frames than are wanted every n-th is taken, n as large as it may be (VideoScene's code takes every second of
    98 and the first 49 of fewer); sizes are stretched, as there. Raises UserError for fewer.
    """
    found = open_frames(place)
    if len(found.names) < frames:
        raise UserError(f"{place} has {len(found.names)} frames, the model takes {frames}; render as many")
    stride = len(found.names) // frames
    images = list(islice(found.read(), 0, stride * frames, stride))
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        raise UserError(f"{place} holds frames of several sizes; give all the same")
    render = torch.stack(images)
    if tuple(render.shape[2:]) == (height, width):
        return render
    return interpolate(render, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
