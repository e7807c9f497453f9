"""`Cameras` to and from other programs' conventions: OpenGL/nerfstudio, COLMAP, PyTorch3D, RealEstate10K.

Ours are camera-to-world, OpenCV axes (x right, y down, z forward) and pixels with the top-left pixel's centre at
(0.5, 0.5). Nothing here checks that a pose is a rotation: see `fvgen.geometry.cameras.pose_problem`.

Sources: nerfstudio documentation, "Data conventions"; COLMAP documentation, "Output Format"; PyTorch3D @ 9381c40,
``renderer/cameras.py``, and what ViewCrafter @ 8408cd5 hands to it; google.github.io/realestate10k, "Data format".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras

REALESTATE_COLUMNS = 19  # timestamp, fx, fy, cx, cy, 0, 0, and the 3x4 matrix


# --- OpenGL, nerfstudio ---


def from_opengl(world_from_cam: Tensor) -> Tensor:
    """[..., 4, 4] OpenGL/nerfstudio camera-to-world (y up, z backwards) to OpenCV, and back: its own inverse."""
    return world_from_cam * world_from_cam.new_tensor([1.0, -1.0, -1.0, 1.0])


to_opengl = from_opengl


# --- COLMAP ---


class ColmapCameras(NamedTuple):
    """V views as COLMAP's text files list them.

    quaternion: [V, 4], (w, x, y, z) with w >= 0, and translation: [V, 3], both of camera-from-world.
    params: [V, 4], those of a PINHOLE camera: fx, fy, cx, cy in pixels, as ours.
    """

    quaternion: Tensor
    translation: Tensor
    params: Tensor
    height: int
    width: int


def to_colmap(cameras: Cameras) -> ColmapCameras:
    """PINHOLE cameras. Skew, which that model lacks, must be zero."""
    pose, matrix = cameras.cam_from_world, cameras.intrinsics
    params = torch.stack([matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 0, 2], matrix[:, 1, 2]], dim=-1)
    return ColmapCameras(rotation_to_quaternion(pose[:, :3, :3]), pose[:, :3, 3], params, cameras.height, cameras.width)


def from_colmap(views: ColmapCameras) -> Cameras:
    """The inverse of `to_colmap`; quaternions need not be of unit length."""
    rotation = quaternion_to_rotation(torch.nn.functional.normalize(views.quaternion, dim=-1)).transpose(1, 2)
    pose = _pose(rotation, -(rotation @ views.translation[..., None])[..., 0])
    fx, fy, cx, cy = views.params.unbind(-1)
    return Cameras(pose, _intrinsics(fx, fy, cx, cy), views.height, views.width)


def quaternion_to_rotation(quaternion: Tensor) -> Tensor:
    """[..., 4] unit quaternions (w, x, y, z), Hamilton's, to rotations [..., 3, 3]."""
    w, x, y, z = quaternion.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def rotation_to_quaternion(rotation: Tensor) -> Tensor:
    """Rotations [..., 3, 3] to unit quaternions [..., 4] (w, x, y, z) with w >= 0.

    The outer product 4 q q^T is linear in the rotation; its row with the largest diagonal entry loses no digits.
    """
    r = rotation
    xx, yy, zz = r[..., 0, 0], r[..., 1, 1], r[..., 2, 2]
    wx, wy, wz = r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]
    xy, xz, yz = r[..., 0, 1] + r[..., 1, 0], r[..., 0, 2] + r[..., 2, 0], r[..., 1, 2] + r[..., 2, 1]
    rows = [
        [1 + xx + yy + zz, wx, wy, wz],
        [wx, 1 + xx - yy - zz, xy, xz],
        [wy, xy, 1 - xx + yy - zz, yz],
        [wz, xz, yz, 1 - xx - yy + zz],
    ]
    outer = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    largest = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = outer.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4))[..., 0, :]
    row = torch.where(row[..., :1] < 0, -row, row)
    return torch.nn.functional.normalize(row, dim=-1)


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """[..., 4] Hamilton's product of quaternions (w, x, y, z): the turn b, then a."""
    (aw, av), (bw, bv) = ((q[..., :1], q[..., 1:]) for q in torch.broadcast_tensors(a, b))
    real = aw * bw - (av * bv).sum(dim=-1, keepdim=True)
    return torch.cat([real, aw * bv + bw * av + torch.linalg.cross(av, bv)], dim=-1)


# --- PyTorch3D ---


class PyTorch3DCameras(NamedTuple):
    """The arguments of PyTorch3D's ``PerspectiveCameras``: row vectors, X_view = X_world R + T; x left, y up.

    R: [V, 3, 3]; T: [V, 3]; focal_length, principal_point: [V, 2], in pixels or, with ``in_ndc``, in units of which
    the short side spans 2, +x left and +y up from the image's centre. image_size: (H, W).
    """

    R: Tensor
    T: Tensor
    focal_length: Tensor
    principal_point: Tensor
    image_size: tuple[int, int]
    in_ndc: bool


def to_pytorch3d(cameras: Cameras, in_ndc: bool = False) -> PyTorch3DCameras:
    """As ViewCrafter does it: two columns negated, the 4x4 inverted, the rotation transposed; to the last bit."""
    turned = cameras.world_from_cam * cameras.world_from_cam.new_tensor([-1.0, -1.0, 1.0, 1.0])
    view_from_world = torch.linalg.inv(turned)
    focal = cameras.intrinsics[:, [0, 1], [0, 1]]
    center = cameras.intrinsics[:, :2, 2]
    if in_ndc:
        half, short = _half_size(cameras.height, cameras.width, center)
        focal, center = focal / short, (half - center) / short
    rotation = view_from_world[:, :3, :3].transpose(1, 2)
    return PyTorch3DCameras(rotation, view_from_world[:, :3, 3], focal, center, (cameras.height, cameras.width), in_ndc)


def from_pytorch3d(views: PyTorch3DCameras) -> Cameras:
    """The inverse of `to_pytorch3d`. One focal length or principal point for all views, or for both axes, will do."""
    count = len(views.R)
    focal = views.focal_length.expand(count, 2)
    center = views.principal_point.expand(count, 2)
    if views.in_ndc:
        half, short = _half_size(*views.image_size, center)
        focal, center = focal * short, half - center * short
    pose = _pose(views.R, -(views.R @ views.T[..., None])[..., 0])  # R is already world-from-view
    pose = pose * pose.new_tensor([-1.0, -1.0, 1.0, 1.0])
    return Cameras(pose, _intrinsics(*focal.unbind(-1), *center.unbind(-1)), *views.image_size)


def world_to_ndc(points: Tensor, cameras: Cameras) -> Tensor:
    """Points [N, 3] in the world to [V, N, 3]: x, y in PyTorch3D's NDC (left, up), z the camera's depth, unscaled.

    What its rasteriser receives, equal to the last bit on a CPU: row vectors, and the matrix products grouped as
    there. Points in the camera's plane become NaN or infinite.
    """
    kind = torch.promote_types(points.dtype, cameras.world_from_cam.dtype)
    views = to_pytorch3d(cameras)
    half, short = _half_size(cameras.height, cameras.width, points.to(kind))
    identity = torch.eye(4, dtype=kind, device=points.device).repeat(len(cameras), 1, 1)

    rotate, shift = identity.clone(), identity.clone()
    rotate[:, :3, :3], shift[:, 3, :3] = views.R, views.T
    view = _transform(points.to(kind).expand(len(cameras), -1, -1), rotate @ shift)

    calibrate = torch.zeros_like(identity)  # screen coordinates with x right, y down
    calibrate[:, [0, 1], [0, 1]], calibrate[:, 2, :2] = views.focal_length.to(kind), views.principal_point.to(kind)
    calibrate[:, 2, 3] = calibrate[:, 3, 2] = 1
    mirror, scale = identity.clone(), identity.clone()  # to x left, y up, then to NDC
    mirror[:, 3, :2] = -2 * views.principal_point
    scale[:, [0, 1], [0, 1]], scale[:, 3, :2] = short, -half
    ndc = _transform(view, calibrate @ (mirror @ torch.linalg.inv(scale)))
    return torch.cat([ndc[..., :2], view[..., 2:]], dim=-1)


def _transform(points: Tensor, matrix: Tensor) -> Tensor:
    """Row vectors [V, N, 3] times [V, 4, 4], divided by the last component."""
    out = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1) @ matrix
    return out[..., :3] / out[..., 3:]


def _half_size(height: int, width: int, like: Tensor) -> tuple[Tensor, float]:
    return like.new_tensor([width / 2, height / 2]), min(height, width) / 2


# --- RealEstate10K, ACID ---


def to_realestate10k(cameras: Cameras, timestamps: list[int], address: str = "") -> str:
    """A camera file: the clip's address, then a line per view: timestamp (microseconds), fx fy cx cy as fractions of
    the image's width and height, two zeros, and the 3x4 camera-from-world matrix row by row, OpenCV axes.
    """
    size = cameras.intrinsics.new_tensor([cameras.width, cameras.height])
    lens = torch.cat([cameras.intrinsics[:, [0, 1], [0, 1]] / size, cameras.intrinsics[:, :2, 2] / size], dim=-1)
    numbers = torch.cat([lens, torch.zeros_like(lens[:, :2]), cameras.cam_from_world[:, :3].flatten(1)], dim=-1)
    lines = [f"{t} {' '.join(map(repr, row))}" for t, row in zip(timestamps, numbers.tolist(), strict=True)]
    return "\n".join([address, *lines]) + "\n"


def from_realestate10k(text: str, height: int, width: int) -> tuple[list[int], Cameras]:
    """Timestamps and float64 cameras of a camera file, for frames of the given size. The first line is an address.

    Raises ValueError, which names the line, for one that is not a timestamp and 18 numbers.
    """
    timestamps, rows = [], []
    lines = text.removeprefix("\ufeff").splitlines()
    if lines and len(lines[0].split()) == REALESTATE_COLUMNS:
        raise ValueError(
            "line 1 is a camera where the clip's address belongs, and would be left out; put a line before it"
        )
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        fields = line.split()
        try:
            if len(fields) != REALESTATE_COLUMNS:
                raise ValueError
            timestamps.append(int(fields[0]))
            rows.append([float(field) for field in fields[1:]])
        except ValueError:
            raise ValueError(f"line {number} is not a timestamp and {REALESTATE_COLUMNS - 1} numbers") from None
    if not rows:
        raise ValueError("it lists no frames")
    values = torch.tensor(rows, dtype=torch.float64)
    size = values.new_tensor([width, height])
    focal, center, matrix = values[:, 0:2] * size, values[:, 2:4] * size, values[:, 6:].reshape(-1, 3, 4)
    rotation = matrix[:, :, :3].transpose(1, 2)
    pose = _pose(rotation, -(rotation @ matrix[:, :, 3:])[..., 0])
    return timestamps, Cameras(pose, _intrinsics(*focal.unbind(-1), *center.unbind(-1)), height, width)


# --- Parts ---


def _pose(rotation: Tensor, translation: Tensor) -> Tensor:
    """[V, 4, 4] from [V, 3, 3] and [V, 3]."""
    pose = torch.eye(4, dtype=rotation.dtype, device=rotation.device).repeat(len(rotation), 1, 1)
    pose[:, :3, :3], pose[:, :3, 3] = rotation, translation
    return pose


def _intrinsics(fx: Tensor, fy: Tensor, cx: Tensor, cy: Tensor) -> Tensor:
    """[V, 3, 3] from four [V]."""
    matrix = torch.eye(3, dtype=fx.dtype, device=fx.device).repeat(len(fx), 1, 1)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 0, 2], matrix[:, 1, 2] = fx, fy, cx, cy
    return matrix
