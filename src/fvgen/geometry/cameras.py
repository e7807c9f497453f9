"""Pinhole cameras: one batch type, OpenCV axes, pixel intrinsics.

Axes are OpenCV's: x right, y down, z forward. The centre of the top-left pixel is at (0.5, 0.5), as in COLMAP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROTATION_TOLERANCE = 1e-3  # tracker poses with six printed digits reach 1e-5; a sheared or scaled pose is far above

PARALLEL = 1e-4  # sine of the angle between view and up below which float32 no longer tells which way is right


@dataclass(frozen=True)
class Cameras:
    """V pinhole cameras that share an image size.

    world_from_cam: [V, 4, 4] camera-to-world, scene units.
    intrinsics: [V, 3, 3], pixels.
    """

    world_from_cam: Tensor
    intrinsics: Tensor
    height: int
    width: int

    def __post_init__(self) -> None:
        views = self.world_from_cam.shape[0]
        assert self.world_from_cam.shape == (views, 4, 4), self.world_from_cam.shape
        assert self.intrinsics.shape == (views, 3, 3), self.intrinsics.shape

    def __len__(self) -> int:
        return self.world_from_cam.shape[0]

    def __getitem__(self, index: slice | list[int] | Tensor) -> Cameras:
        """The chosen views, still a batch: index with a slice or a list, not a bare integer."""
        return replace(self, world_from_cam=self.world_from_cam[index], intrinsics=self.intrinsics[index])

    @property
    def cam_from_world(self) -> Tensor:
        """[V, 4, 4] world-to-camera, by the transpose: exact for rigid poses."""
        rotation = self.world_from_cam[:, :3, :3].transpose(1, 2)
        out = torch.zeros_like(self.world_from_cam)
        out[:, :3, :3] = rotation
        out[:, :3, 3:] = -rotation @ self.world_from_cam[:, :3, 3:]
        out[:, 3, 3] = 1
        return out

    @property
    def centers(self) -> Tensor:
        """[V, 3] camera centres in the world."""
        return self.world_from_cam[:, :3, 3]

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Cameras:
        """The same views on another device or in another precision."""
        pose, intrinsics = (matrix.to(device=device, dtype=dtype) for matrix in (self.world_from_cam, self.intrinsics))
        return replace(self, world_from_cam=pose, intrinsics=intrinsics)

    def fitted(self, height: int, width: int) -> Cameras:
        """The same views after `fit_box`'s centred crop and a resize to height x width."""
        left, top, right, bottom = fit_box(self.height, self.width, height, width)
        intrinsics = self.intrinsics.clone()
        intrinsics[:, 0, 2] -= left
        intrinsics[:, 1, 2] -= top
        intrinsics[:, 0] *= width / (right - left)
        intrinsics[:, 1] *= height / (bottom - top)
        return replace(self, intrinsics=intrinsics, height=height, width=width)


def fit_box(height: int, width: int, new_height: int, new_width: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom): the largest centred box of the new aspect ratio, in pixels of the old image."""
    scale = min(height / new_height, width / new_width)
    box_height, box_width = new_height * scale, new_width * scale
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def pose_problem(world_from_cam: Tensor) -> str | None:
    """What is wrong with a [4, 4] (or [3, 4]) pose, as the end of a sentence; None for a proper rigid motion."""
    pose = world_from_cam.double()
    if pose.shape not in ((4, 4), (3, 4)):
        return f"is {'x'.join(map(str, pose.shape))}, not 4x4"
    if not torch.isfinite(pose).all():
        return "holds NaN or infinity"
    rotation = pose[:3, :3]
    error = (rotation @ rotation.T - torch.eye(3, dtype=torch.float64)).abs().max().item()
    if error > ROTATION_TOLERANCE:
        return f"is no rotation (R R^T is off the identity by {error:.2g}: scaled or sheared)"
    if torch.linalg.det(rotation) < 0:
        return "is mirrored (determinant -1: a left-handed frame)"
    if pose.shape == (4, 4) and (pose[3] - pose.new_tensor([0, 0, 0, 1])).abs().max() > 1e-6:
        return "has a last row other than 0 0 0 1"
    return None


def look_at(position: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """[V, 4, 4] OpenCV camera-to-world at ``position`` [V, 3] facing ``target`` [V, 3], ``up`` [3] pointing up.

    A view straight along ``up`` leaves the camera's turn open; the image's top then points along the world axis that
    is least parallel to ``up``, the same one for all views. Raises ValueError where position and target are one point.
    """
    forward = torch.nn.functional.normalize(target - position, dim=-1)
    if not forward.any(-1).all():
        raise ValueError("look_at: a camera's position is its target, so it has no direction; move one of them")
    side = torch.linalg.cross(forward, up.expand_as(forward))
    parallel = side.norm(dim=-1) < PARALLEL * up.norm()
    if parallel.any():
        axis = torch.eye(3, dtype=forward.dtype, device=forward.device)[up.abs().argmin()]
        side = torch.where(parallel[:, None], torch.linalg.cross(forward, axis.expand_as(forward)), side)
    right = torch.nn.functional.normalize(side, dim=-1)
    down = torch.linalg.cross(forward, right)
    pose = torch.eye(4, dtype=position.dtype, device=position.device).repeat(position.shape[0], 1, 1)
    pose[:, :3, :3] = torch.stack([right, down, forward], dim=-1)
    pose[:, :3, 3] = position
    return pose


def pinhole(views: int, height: int, width: int, horizontal_fov: float) -> Tensor:
    """[V, 3, 3] intrinsics in pixels: square pixels, centred principal point, field of view in degrees."""
    focal = width / 2 / math.tan(math.radians(horizontal_fov) / 2)
    matrix = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return matrix.expand(views, 3, 3).clone()


def pixel_rays(cameras: Cameras, offset: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """[V, H, W, 3] directions in the world with unit camera z (not unit length), through each pixel at ``offset``.

    origin + depth * ray is the point at that depth along the optical axis.
    """
    kind = {"dtype": cameras.intrinsics.dtype, "device": cameras.intrinsics.device}
    y, x = torch.meshgrid(torch.arange(cameras.height, **kind), torch.arange(cameras.width, **kind), indexing="ij")
    pixels = torch.stack([x + offset[0], y + offset[1], torch.ones_like(x)], dim=-1)
    rays = torch.einsum("vij,hwj->vhwi", torch.linalg.inv(cameras.intrinsics), pixels)
    return torch.einsum("vij,vhwj->vhwi", cameras.world_from_cam[:, :3, :3], rays)


def project(points: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Points [N, 3] in the world to pixels [V, N, 2] and depths [V, N] (camera z; negative behind the camera)."""
    cam_from_world = cameras.cam_from_world
    local = torch.einsum("vij,nj->vni", cam_from_world[:, :3, :3], points) + cam_from_world[:, None, :3, 3]
    image = torch.einsum("vij,vnj->vni", cameras.intrinsics, local)
    depth = local[..., 2]
    safe = torch.where(depth.abs() < 1e-8, torch.full_like(depth, 1e-8), depth)
    return image[..., :2] / safe[..., None], depth
