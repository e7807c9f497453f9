"""The cameras that a call is given, as a model that is guided by them sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.plucker import normalised, packed

GivenCameras = Cameras | Sequence[Cameras] | None
UNGUIDED = "cameras have no effect: this model is not guided by them; leave cameras out"


def camera_path(wanted: bool, cameras: GivenCameras, render: Tensor) -> Tensor | None:
    """[1 or B, F, 21] float32, `packed` paths that are `normalised`, for ``render`` [B, F, C, H, W]; None for a model
    that does not want them. One path holds for all clips.

    Raises UserError for cameras that are missing, unwanted, as many as nothing else, of another image size, or still.
    """
    if not wanted:
        if cameras is not None:
            raise UserError(UNGUIDED)
        return None
    if cameras is None:
        raise UserError("this model is guided by cameras; give cameras=..., a camera for each frame")
    given = [cameras] if isinstance(cameras, Cameras) else list(cameras)
    clips, frames, _, height, width = render.shape
    if len(given) not in (1, clips):
        raise UserError(f"{len(given)} camera paths were given for {clips} clips; give one path for each, or one")
    for each in given:
        if (len(each), each.height, each.width) != (frames, height, width):
            raise UserError(
                f"{len(each)} cameras of {each.height}x{each.width} were given for {frames} frames of {height}x{width};"
                " give one for each frame, `fitted` to its size"
            )
    return torch.stack([clip_path(each) for each in given])


def clip_path(cameras: Cameras) -> Tensor:
    """[F, 21] float32: the path of one clip."""
    return packed(normalised(cameras)[0]).float()
