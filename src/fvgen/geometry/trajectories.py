"""Camera paths that users expect: `interpolate`, `orbit`, `spiral`, `dolly`, `pan`, `look_at_path`, `read_path`.

All return `Cameras` of ``frames`` views, float64, in the first camera's world. They are smooth (no jump in velocity)
and exact at their end points: the first view of a path from a camera *is* that camera, bit for bit, and the last one
is what was asked for. Angles are in degrees, distances in scene units. ViewCrafter's own paths, which are neither, are
in `fvgen.geometry.viewcrafter_paths`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, look_at, pose_problem
from fvgen.geometry.conventions import from_opengl
from fvgen.geometry.focus_point import focus_point
from fvgen.geometry.viewcrafter_paths import single_view_target, single_view_txt, sparse_interpolation
from fvgen.system.doors import read_json
from fvgen.system.files import write_json

SAME_PLACE = 1e-9  # scene units; nearer centres than this are one


# --- Through given views ---


def interpolate(cameras: Cameras, frames: int, keys: Sequence[int] | None = None) -> Cameras:
    """A smooth path through V >= 2 views in their order; each is met exactly, at ``keys`` or `key_frames`.

    Centres follow a natural cubic spline, rotations scipy's RotationSpline (continuous angular acceleration),
    intrinsics a curve that never overshoots. Raises UserError for fewer frames than views.
    """
    from scipy.interpolate import CubicSpline, PchipInterpolator  # half a second to import
    from scipy.spatial.transform import Rotation, RotationSpline

    cameras = cameras.to(dtype=torch.float64)
    keys, times = list(keys) if keys else key_frames(cameras, frames), np.arange(frames)
    rotations = Rotation.from_matrix(cameras.world_from_cam[:, :3, :3].numpy())
    pose = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    pose[:, :3, :3] = torch.from_numpy(RotationSpline(keys, rotations)(times).as_matrix())
    pose[:, :3, 3] = torch.from_numpy(CubicSpline(keys, cameras.centers.numpy(), bc_type="natural")(times))
    intrinsics = torch.from_numpy(PchipInterpolator(keys, cameras.intrinsics.numpy())(times))
    pose[keys], intrinsics[keys] = cameras.world_from_cam, cameras.intrinsics
    return replace(cameras, world_from_cam=pose, intrinsics=intrinsics)


def key_frames(cameras: Cameras, frames: int) -> list[int]:
    """[V] frame numbers at which `interpolate` meets the views: 0, ..., frames - 1, spaced by how far they are apart.

    Apart is the angle of the turn in radians plus the distance over the mean distance of neighbours.
    """
    views = len(cameras)
    if views < 2:
        raise UserError(f"a path through views needs at least two of them, not {views}; add a view or choose an orbit")
    if frames < views:
        raise UserError(f"a path through {views} views cannot have {frames} frames; ask for at least {views}")
    pose = cameras.world_from_cam.double()
    step = (pose[1:, :3, 3] - pose[:-1, :3, 3]).norm(dim=-1)
    chord = (pose[1:, :3, :3] - pose[:-1, :3, :3]).flatten(1).norm(dim=-1)
    apart = 2 * (chord / 8**0.5).clamp(max=1).asin() + step / step.mean().clamp(min=SAME_PLACE)
    apart = apart.clamp(min=1e-3 * apart.max().item() + SAME_PLACE)
    place = torch.cat([apart.new_zeros(1), apart.cumsum(0)]) * (frames - 1) / apart.sum()
    keys = [0]
    for view in range(1, views - 1):  # at least one frame after the last key, and room for those that follow
        keys.append(min(max(round(place[view].item()), keys[-1] + 1), frames - views + view))
    return [*keys, frames - 1]


# --- From one view ---


def orbit(camera: Cameras, frames: int, angle: float, distance: float, up: Sequence[float] | None = None) -> Cameras:
    """Round the point ``distance`` in front of one camera, about the axis ``up`` (its own up if None), by ``angle``.

    The camera turns with the circle, so what it looked at stays where it is in the image. Positive: to its right.
    """
    pose, _ = _single(camera)
    axis = _axis(-pose[:3, 1] if up is None else up)
    center = pose[:3, 3] + distance * pose[:3, 2]
    # Seen from above, a camera that goes to its right goes round counter-clockwise.
    return _moved(camera, [_about(center, axis, s * angle) for s in _even(frames)])


def pan(camera: Cameras, frames: int, yaw: float = 0.0, pitch: float = 0.0) -> Cameras:
    """One camera turns where it stands: ``yaw`` to its right about its up axis, then ``pitch`` upwards."""
    pose, _ = _single(camera)
    here, right, up = pose[:3, 3], pose[:3, 0], -pose[:3, 1]
    turns = [_about(here, up, -s * yaw) @ _about(here, right, s * pitch) for s in _even(frames)]
    return _moved(camera, turns)


def dolly(camera: Cameras, frames: int, forward: float = 0.0, right: float = 0.0, up: float = 0.0) -> Cameras:
    """One camera moves straight, without turning, by the given distances along its own axes."""
    pose, _ = _single(camera)
    way = pose[:3, :3] @ pose.new_tensor([right, -up, forward])
    return _moved(camera, [_shift(s * way) for s in _even(frames)])


def spiral(camera: Cameras, frames: int, radius: float, distance: float, turns: float = 2.0) -> Cameras:
    """One camera winds out of its place to ``radius`` and back again, always facing the point at ``distance``.

    The camera's own plane holds the spiral: offset = radius sin(pi s) (cos, sin)(2 pi turns s), s from 0 to 1.
    """
    pose, _ = _single(camera)
    s = torch.tensor(_even(frames), dtype=torch.float64)
    reach, turn = radius * (math.pi * s).sin(), 2 * math.pi * turns * s
    offset = torch.stack([reach * turn.cos(), reach * turn.sin(), torch.zeros_like(s)], dim=-1)
    position = pose[:3, 3] + offset @ pose[:3, :3].T
    target = (pose[:3, 3] + distance * pose[:3, 2]).expand_as(position)
    out = look_at(position, target, -pose[:3, 1])
    out[[0, -1]] = pose  # there the offset is zero but for rounding
    return _repeat(camera, out)


def look_at_path(
    positions: Tensor, target: Tensor, frames: int, lens: Cameras, up: Sequence[float] = (0.0, 0.0, 1.0)
) -> Cameras:
    """Along a spline through ``positions`` [P, 3], P >= 2, always facing ``target`` [3]; intrinsics of ``lens``.

    ``up`` points up in the images. First and last view stand exactly at the first and last position.
    """
    from scipy.interpolate import CubicSpline

    points = positions.double()
    step = (points[1:] - points[:-1]).norm(dim=-1)
    if len(points) < 2 or (step < SAME_PLACE).any():
        raise UserError("a look-at path needs two or more positions, each another than the one before; remove repeats")
    along = torch.cat([step.new_zeros(1), step.cumsum(0)])
    way = CubicSpline(along.numpy(), points.numpy(), bc_type="natural")
    position = torch.from_numpy(way(np.array(_even(frames)) * along[-1].item()))
    position[[0, -1]] = points[[0, -1]]
    poses = look_at(position, target.double().expand_as(position), torch.tensor(up, dtype=torch.float64))
    return _repeat(lens, poses)


# --- From a file ---


def read_path(file: str | Path, height: int, width: int, dataparser_transforms: str | Path | None = None) -> Cameras:
    """A path from a JSON file, for images of the given size. Two layouts are known.

    ``{"world_from_cam": [4x4, ...], "intrinsics": [3x3, ...], "height": h, "width": w}``: ours, OpenCV axes; one
    matrix of intrinsics may serve all. ``{"camera_path": [{"camera_to_world": 16 numbers, "fov": degrees}, ...]}``:
    what nerfstudio's viewer exports, OpenGL axes, ``fov`` vertical. Sizes in the file, where there are any, are fitted
    by a centred crop. nerfstudio's viewer works in a world that was turned, centred and scaled: its poses come back to
    that of ``transforms.json`` through ``dataparser_transforms``, the file dataparser_transforms.json that is written
    beside each training. Raises UserError for anything else, for poses that are no rotations, and cameras other than
    perspective ones.
    """
    file = Path(file)
    try:
        document = read_json(file)
    except UserError as error:
        raise UserError(f"camera path {file} cannot be read as JSON ({error})") from error
    if not isinstance(document, dict):
        raise UserError(f"camera path {file} is not laid out as docs/data.md says (no object); export the path again")
    kind = document.get("camera_type", "perspective")
    if not isinstance(kind, str) or kind.lower() != "perspective":
        raise UserError(f"camera path {file} has camera_type {str(kind)[:40]!r}; only perspective paths are rendered")
    try:
        cameras = _nerfstudio_path(document, height, width) if "camera_path" in document else _own_path(document)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"camera path {file} is not laid out as docs/data.md says ({type(error).__name__}: {str(error)[:100]}); "
            "give world_from_cam and intrinsics, or camera_path as nerfstudio exports it"
        ) from error
    if dataparser_transforms is not None:
        cameras = replace(cameras, world_from_cam=_dataset_world(cameras.world_from_cam, Path(dataparser_transforms)))
    for number, (pose, matrix) in enumerate(zip(cameras.world_from_cam, cameras.intrinsics, strict=True)):
        if problem := pose_problem(pose):
            raise UserError(f"camera path {file}: pose {number} {problem}; export the path again")
        if not (torch.isfinite(matrix).all() and matrix[0, 0] > 0 and matrix[1, 1] > 0):
            raise UserError(f"camera path {file}: the focal length of view {number} is not positive; give it in pixels")
    return cameras.fitted(height, width)


def _dataset_world(poses: Tensor, file: Path) -> Tensor:
    """The inverse of nerfstudio's dataparser: exported = scale * (transform @ pose) for positions, for rotations
    without the scale."""
    document = read_json(file)
    try:
        motion = torch.tensor(document["transform"], dtype=torch.float64)
        scale = float(document["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} has no transform (3x4) and scale; give dataparser_transforms.json of the training"
        ) from error
    if motion.shape not in ((3, 4), (4, 4)) or not 0 < scale < 1e12 or pose_problem(motion[:3]):
        why = f"scale {scale:g}" if not 0 < scale < 1e12 else "a transform that is no 3x4 rigid motion"
        raise UserError(f"{file} holds {why}; give dataparser_transforms.json of the training")
    turn = motion[:3, :3].T
    out = poses.clone()
    out[:, :3, :3] = turn @ poses[:, :3, :3]
    out[:, :3, 3] = (poses[:, :3, 3] / scale - motion[:3, 3]) @ turn.T
    return out


def write_path(file: str | Path, cameras: Cameras) -> None:
    """Write ``cameras`` so that `read_path` reads the same numbers back."""
    matrices = {"world_from_cam": cameras.world_from_cam.tolist(), "intrinsics": cameras.intrinsics.tolist()}
    write_json(file, matrices | {"height": cameras.height, "width": cameras.width})


def _own_path(document: dict) -> Cameras:
    pose = torch.tensor(document["world_from_cam"], dtype=torch.float64)
    matrix = torch.tensor(document["intrinsics"], dtype=torch.float64)
    if pose.ndim != 3 or pose.shape[1:] != (4, 4) or not len(pose):
        raise ValueError(f"world_from_cam has the shape {list(pose.shape)}, not [V, 4, 4]")
    if matrix.shape not in ((3, 3), (1, 3, 3), (len(pose), 3, 3)):
        raise ValueError(f"intrinsics has the shape {list(matrix.shape)}, not [3, 3] or [V, 3, 3]")
    height, width = _size(document["height"]), _size(document["width"])
    return Cameras(pose, matrix.expand(len(pose), 3, 3).clone(), height, width)


def _nerfstudio_path(document: dict, height: int, width: int) -> Cameras:
    listed = document["camera_path"]
    height, width = _size(document.get("render_height", height)), _size(document.get("render_width", width))
    poses = torch.tensor([view["camera_to_world"] for view in listed], dtype=torch.float64).reshape(-1, 4, 4)
    fov = torch.tensor([view["fov"] for view in listed], dtype=torch.float64)
    if not len(poses) or not ((fov > 0) & (fov < 180)).all():
        raise ValueError("it lists no views, or a fov outside 0 to 180 degrees")
    intrinsics = torch.eye(3, dtype=torch.float64).repeat(len(poses), 1, 1)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = height / 2 / torch.tan(torch.deg2rad(fov) / 2)
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = width / 2, height / 2
    return Cameras(from_opengl(poses), intrinsics, height, width)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or not 0 < value < 1e6:
        raise ValueError(f"{str(value)[:40]} is no image size")
    return int(value)


# --- Parts ---


def _single(camera: Cameras) -> tuple[Tensor, Tensor]:
    """Pose [4, 4] and intrinsics [3, 3] of a batch of one."""
    if len(camera) != 1:
        raise ValueError(f"this path starts from one camera, got {len(camera)}; choose one, for example cameras[[0]]")
    return camera.world_from_cam[0].double(), camera.intrinsics[0].double()


def _even(frames: int) -> list[float]:
    """0 to 1 in equal steps, both exact."""
    if frames < 2:
        raise UserError(f"a camera path has at least two frames, not {frames}; ask for more")
    return [frame / (frames - 1) for frame in range(frames)]


def _moved(camera: Cameras, motions: list[Tensor]) -> Cameras:
    """The camera under each rigid motion [4, 4] of the world; the first must be none, and is left out."""
    pose, _ = _single(camera)
    return _repeat(camera, torch.stack([pose, *(motion @ pose for motion in motions[1:])]))


def _repeat(camera: Cameras, poses: Tensor) -> Cameras:
    intrinsics = camera.intrinsics[:1].double().repeat(len(poses), 1, 1)
    return replace(camera, world_from_cam=poses, intrinsics=intrinsics)


def _axis(direction: Tensor | Sequence[float]) -> Tensor:
    axis = torch.as_tensor(direction, dtype=torch.float64)
    if not axis.norm() > 0:
        raise ValueError(f"an axis of rotation must have a direction, got {axis.tolist()}")
    return axis / axis.norm()


def _shift(by: Tensor) -> Tensor:
    motion = torch.eye(4, dtype=torch.float64)
    motion[:3, 3] = by
    return motion


def _about(center: Tensor, axis: Tensor, degrees: float) -> Tensor:
    """[4, 4]: right-handed rotation about a line, by Rodrigues' formula."""
    cross = torch.linalg.cross(axis.expand(3, 3), torch.eye(3, dtype=torch.float64)).T  # cross @ v = axis x v
    angle = math.radians(degrees)
    rotation = torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    motion = torch.eye(4, dtype=torch.float64)
    motion[:3, :3], motion[:3, 3] = rotation, center - rotation @ center
    return motion


PRESETS: dict[str, Callable[..., Cameras]] = {
    "interpolate": interpolate,
    "orbit": orbit,
    "spiral": spiral,
    "dolly": dolly,
    "pan": pan,
    "look_at": look_at_path,
    "file": read_path,
    "focus_point": focus_point,
    "viewcrafter_target": single_view_target,
    "viewcrafter_txt": single_view_txt,
    "viewcrafter_interpolation": sparse_interpolation,
}
