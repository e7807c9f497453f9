"""The camera path between two views of VideoScene's demo: round the point that both look at.

The pivot is where the two look rays pass each other nearest. In a frame whose Y is the normal of the plane of both look
directions and whose Z is the first one, each camera is its offset from the pivot in axes of its own (Y x look, Y, look)
and two Euler angles. Offsets run straight from the one to the other, angles the short way round.

Facts: `hanyang-21/VideoScene` at 70e9c84, whose paths it reproduces to 1e-5; the code is ours.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras

PARALLEL = 1e-4  # looks whose cosine is nearer than this to 1 or -1 meet nowhere


def focus_point(cameras: Cameras, frames: int, eased: bool = False) -> Cameras:
    """A path of ``frames`` views from the first of two cameras to the second, float64; both ends are met bit for bit.

    ``eased``: slow at both ends, (1 - cos(pi s)) / 2, as the demo moves; else at even speed. Intrinsics run straight.
    Raises UserError for other than two cameras, and for fewer than two frames.
    """
    if len(cameras) != 2:
        raise UserError(f"a path round a focus point runs between two views, not {len(cameras)}; choose two")
    if frames < 2:
        raise UserError(f"a camera path has at least two frames, not {frames}; ask for more")
    cameras = cameras.to(dtype=torch.float64)
    s = torch.linspace(0, 1, frames, dtype=torch.float64)
    if eased:
        s = (1 - (math.pi * s).cos()) / 2
    poses = focus_point_poses(*cameras.world_from_cam, s)
    poses[[0, -1]] = cameras.world_from_cam
    intrinsics = torch.lerp(cameras.intrinsics[:1], cameras.intrinsics[1:], s.view(-1, 1, 1))
    return replace(cameras, world_from_cam=poses, intrinsics=intrinsics)


def focus_point_poses(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """Camera-to-world [n, 4, 4] float64 between a and b [4, 4] at shares ``s`` [n] of the way."""
    a, b, s = a.double(), b.double(), s.double()
    pivot, frame = _pivot(a, b), _frame(a[:3, 2], b[:3, 2])
    (offset_a, angles_a), (offset_b, angles_b) = (_coordinates(pose, pivot, frame) for pose in (a, b))
    turn = torch.remainder(angles_b - angles_a + math.pi, 2 * math.pi) - math.pi
    offset = torch.lerp(offset_a, offset_b, s[:, None])
    angles = angles_a + s[:, None] * turn
    rotation = frame @ _from_angles(angles)
    poses = torch.eye(4, dtype=torch.float64).repeat(len(s), 1, 1)
    poses[:, :3, :3] = rotation
    poses[:, :3, 3] = pivot - (_axes(rotation[:, :, 2], frame[:, 1]) @ offset[:, :, None])[:, :, 0]
    return poses


def _pivot(a: Tensor, b: Tensor) -> Tensor:
    """[3]: the least squares intersection of the look rays, or the midpoint of the origins of parallel ones."""
    looks, origins = torch.stack([a[:3, 2], b[:3, 2]]), torch.stack([a[:3, 3], b[:3, 3]])
    if (looks[0] @ looks[1]).abs().sub(1).abs() < PARALLEL:
        return origins.mean(dim=0)
    across = torch.eye(3, dtype=torch.float64) - looks[:, :, None] * looks[:, None, :]
    return torch.linalg.solve(across.sum(0), (across @ origins[:, :, None]).sum(0))[:, 0]


def _frame(look: Tensor, other: Tensor) -> Tensor:
    """[3, 3]: X, Y, Z in columns; Z is ``look``, Y the normal of its plane with ``other``."""
    normal = torch.linalg.cross(look, other)
    if normal.norm() < 1e-8:  # any plane through the look will do
        axis = torch.zeros(3, dtype=torch.float64)
        axis[look.abs().argmin()] = 1
        normal = torch.linalg.cross(look, axis)
    y = normal / normal.norm()
    return torch.stack([torch.linalg.cross(y, look), y, look], dim=1)


def _axes(look: Tensor, y: Tensor) -> Tensor:
    """[..., 3, 3]: Y x look, Y, look in columns."""
    y = y.expand_as(look)
    return torch.stack([torch.linalg.cross(y, look), y, look], dim=-1)


def _coordinates(pose: Tensor, pivot: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
    """(vector [3] to the pivot in the camera's axes, angles [2] about y and z)."""
    offset = torch.linalg.solve(_axes(pose[:3, 2], frame[:, 1]), pivot - pose[:3, 3])
    turned = frame.T @ pose[:3, :3]  # = Ry(y) Rx(x) Rz(z), x = 0 for a look in the frame's plane
    y = torch.atan2(turned[0, 2], turned[2, 2])
    z = torch.atan2(turned[1, 0], turned[1, 1])
    return offset, torch.stack([y, z])


def _from_angles(angles: Tensor) -> Tensor:
    """[n, 3, 3] = Ry(y) Rz(z) of angles [n, 2]."""
    (cy, cz), (sy, sz) = angles.cos().unbind(1), angles.sin().unbind(1)
    zero, one = torch.zeros_like(cy), torch.ones_like(cy)
    about_y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], dim=1).view(-1, 3, 3)
    about_z = torch.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one], dim=1).view(-1, 3, 3)
    return about_y @ about_z
