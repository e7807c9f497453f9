"""Clips: a point render along a camera path and the true frames, the pair that teacher and student learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.closing import closed
from fvgen.geometry.pointcloud import render_points


@dataclass(frozen=True, eq=False)
class Others:
    """Views [U] of a clip's scene that are no frames of it.

    images: [U, 3, H, W] in [0, 1], as large as the clip's. cameras: theirs. depth: [F + U, H, W], camera z in scene
    units, of the clip's frames and then of these; None where nobody knows.
    """

    images: Tensor
    cameras: Cameras
    depth: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Clip:
    """One training or evaluation pair.

    truth: [F, 3, H, W] in [0, 1], the photographs.
    render: [F, 3, H, W] in [0, 1], point renders over black; known frames are the photographs themselves.
    known: [F] bool, the frames that the point cloud was made from; they are no novel views and are never scored.
    cameras: of the F frames at H x W, in scene units; None where nobody kept them.
    shown: [F, H, W] bool, where the truth is one: false where the photographs' masks hide what is no part of the scene.
        None: everywhere.
    others: more views of the scene, for what is to look right from off the path, too.

    Raises UserError for parts that do not fit each other.
    """

    name: str
    truth: Tensor
    render: Tensor
    known: Tensor
    cameras: Cameras | None = None
    shown: Tensor | None = None
    others: Others | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.truth.shape)
        if len(shape) != 4 or shape[1] != 3 or not self.truth.is_floating_point():
            raise UserError(f"clip {self.name}: truth is {_kind(self.truth)}; give floats [frames, 3, height, width]")
        if tuple(self.render.shape) != shape or not self.render.is_floating_point():
            raise UserError(f"clip {self.name}: render is {_kind(self.render)}; give floats {list(shape)}, as truth is")
        if tuple(self.known.shape) != shape[:1] or self.known.dtype != torch.bool:
            raise UserError(f"clip {self.name}: known is {_kind(self.known)}; give bool [{shape[0]}]")
        if (c := self.cameras) is not None and (len(c), c.height, c.width) != (shape[0], *shape[2:]):
            raise UserError(
                f"clip {self.name}: {len(c)} cameras of {c.height}x{c.width} for {shape[0]} frames of "
                f"{shape[2]}x{shape[3]}; give one for each frame, `fitted` to its size"
            )
        if (s := self.shown) is not None and (s.dtype != torch.bool or tuple(s.shape) != (shape[0], *shape[2:])):
            raise UserError(
                f"clip {self.name}: shown is {_kind(s)}; give bool {[shape[0], *shape[2:]]}, a value for each pixel"
            )


def render_clip(
    name: str,
    truth: Tensor,
    cameras: Cameras,
    points: Tensor,
    colors: Tensor,
    known: Sequence[int],
    radius: float,
    close: bool = False,
) -> tuple[Clip, Tensor]:
    """Render the cloud (points [N, 3], colors [N, 3]) into every camera and put the known photographs back in.

    ``radius`` is in normalised device units (the short side spans 2), as in `render_points`; ``close``: leave no holes,
    see `fvgen.geometry.closing`. Returns the clip, and where the cloud is seen, [F, H, W] bool.
    """
    image, visibility, _ = render_points(points, colors, cameras, radius=radius)
    render = image.permute(0, 3, 1, 2).clamp(0, 1)
    if close:
        render = closed(render, visibility)
    mask = torch.zeros(len(cameras), dtype=torch.bool)
    mask[list(known)] = True
    return Clip(name, truth, torch.where(mask[:, None, None, None], truth, render), mask, cameras), visibility > 0


def shown_of(clip: Clip) -> Tensor:
    """[F, H, W] bool: where a clip's truth is one, written out."""
    return torch.ones_like(clip.truth[:, 0], dtype=torch.bool) if clip.shown is None else clip.shown


def to_bytes(image: Tensor) -> Tensor:
    """[0, 1] to uint8, as clips are kept; photographs, which were 8-bit, lose nothing."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
