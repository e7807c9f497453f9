"""Whether pictures show one scene, as their cameras say: formulas for matches and for tracks. No network, no weights.

Source: Hartley and Zisserman, Multiple View Geometry, 2nd edition: sections 9.2 (the fundamental matrix), 4.2.6 and
11.4.3 (Sampson's distance, of a homography and of epipolar geometry). Pixels are those of `fvgen.geometry.cameras`;
all is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras

ONE_PLACE = 1e-6  # of the largest coordinate: centres nearer to each other than rounding tells apart


def match_distance(a: Tensor, b: Tensor, cameras: Cameras, first: int, second: int) -> Tensor:
    """[M] pixels from matches ``a`` [M, 2] in view ``first`` and ``b`` [M, 2] in view ``second`` to the nearest pair of
    pixels that the two cameras allow, to first order: Sampson's distance to the epipolar constraint, or, for two views
    from one place, which have none, to the homography between them."""
    cameras = cameras.to(dtype=torch.float64)
    between = (cameras.centers[first] - cameras.centers[second]).norm()
    if between <= ONE_PLACE * cameras.centers.abs().max():
        return homography_distance(a, b, homography(cameras, first, second))
    return sampson_distance(a, b, fundamental(cameras, first, second))


def fundamental(cameras: Cameras, first: int, second: int) -> Tensor:
    """[3, 3] F with b^T F a = 0 for pixels a of view ``first`` and b of view ``second`` that show one point."""
    cameras = cameras.to(dtype=torch.float64)
    moved = cameras.cam_from_world[second] @ cameras.world_from_cam[first]
    x, y, z = moved[:3, 3].tolist()
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    back = torch.linalg.inv(cameras.intrinsics)
    return back[second].T @ cross @ moved[:3, :3] @ back[first]


def homography(cameras: Cameras, first: int, second: int) -> Tensor:
    """[3, 3] from pixels of view ``first`` to those of ``second``, which was taken from the same place."""
    cameras = cameras.to(dtype=torch.float64)
    turn = cameras.cam_from_world[second, :3, :3] @ cameras.world_from_cam[first, :3, :3]
    return cameras.intrinsics[second] @ turn @ torch.linalg.inv(cameras.intrinsics[first])


def sampson_distance(a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """[M] pixels: |b^T F a| over the root of the sum of the squares of its four derivatives."""
    a, b = _homogeneous(a), _homogeneous(b)
    line_b, line_a = a @ matrix.T, b @ matrix
    slope = line_b[:, :2].square().sum(1) + line_a[:, :2].square().sum(1)
    return (b * line_b).sum(1).abs() / slope.sqrt().clamp(min=1e-300)


def homography_distance(a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """[M] pixels: root of e^T (J J^T + 1)^-1 e, e = b - H(a) and J [2, 2] H's derivative at a."""
    image = _homogeneous(a) @ matrix.T
    there = image[:, :2] / image[:, 2:]
    slope = (matrix[:2, :2] - there[:, :, None] * matrix[2, :2]) / image[:, 2:, None]
    spread = slope @ slope.transpose(1, 2) + torch.eye(2, dtype=torch.float64)
    error = (b.double() - there)[..., None]
    return (error.transpose(1, 2) @ torch.linalg.solve(spread, error)).flatten().clamp(min=0).sqrt()


def reprojection_distance(points: Tensor, cameras: Cameras, pixels: Tensor, view: Tensor) -> Tensor:
    """[M] pixels between where points [M, 3] fall in the views [M] and where they were seen [M, 2]."""
    cameras = cameras.to(dtype=torch.float64)
    pose = cameras.cam_from_world[view]
    local = (pose[:, :3, :3] @ points.double()[..., None])[..., 0] + pose[:, :3, 3]
    image = (cameras.intrinsics[view] @ local[..., None])[..., 0]
    return (image[:, :2] / image[:, 2:] - pixels.double()).norm(dim=1)


def track_lengths(point: Tensor, counted: Tensor) -> Tensor:
    """How many views see each of the points that at least one of the ``counted`` [M] (bool) observations is of;
    ``point``: [M], which point each observation is of."""
    if not len(point):
        return point
    lengths = torch.bincount(point)
    return lengths[torch.bincount(point[counted], minlength=len(lengths)) > 0]


def _homogeneous(pixels: Tensor) -> Tensor:
    return torch.nn.functional.pad(pixels.double(), (0, 1), value=1.0)
