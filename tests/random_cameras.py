"""Random cameras for round trips: rotations from all around, uneven focal lengths, off-centre principal points."""

from __future__ import annotations

import torch

from fvgen.geometry.cameras import Cameras


def random_cameras(seed: int, views: int = 3, height: int = 7, width: int = 9) -> Cameras:
    """float64; every tenth rotation is by exactly half a turn, where quaternions are hardest."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(views, 3, 3, generator=generator, dtype=torch.float64)).Q
    rotation = rotation * torch.linalg.det(rotation)[:, None, None]  # -R has determinant +1 where R has -1
    axis = rotation[::10, :, :1]
    rotation[::10] = 2 * axis @ axis.transpose(1, 2) - torch.eye(3, dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    pose[:, :3, :3] = rotation
    pose[:, :3, 3] = torch.randn(views, 3, generator=generator, dtype=torch.float64) * 5
    intrinsics = torch.eye(3, dtype=torch.float64).repeat(views, 1, 1)
    intrinsics[:, [0, 1], [0, 1]] = 5 + 20 * torch.rand(views, 2, generator=generator, dtype=torch.float64)
    intrinsics[:, 0, 2] = width * torch.rand(views, generator=generator, dtype=torch.float64)
    intrinsics[:, 1, 2] = height * torch.rand(views, generator=generator, dtype=torch.float64)
    return Cameras(pose, intrinsics, height, width)
