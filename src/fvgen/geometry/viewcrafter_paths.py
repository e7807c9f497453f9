"""ViewCrafter's own camera paths, quirks included: what its teachers were trained and are used with.

Facts: Drexubery/ViewCrafter @ 8408cd5. A single view is put into an object frame, whose origin is the point of
interest, and its camera then moves about that origin by theta (elevation, about x) and phi (azimuth, about y), in
degrees, and along the optical axis. Several views are joined by straight lines whose last step is twice as long.
All paths are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.system.doors import read_text

LOOK_AHEAD = 0.1  # scene units: rotations are interpolated as two points this far off the camera, ahead and up
LINEAR_UP_TO = 3  # knots of a txt path that are joined by lines; more get a smoothing spline


def to_camera_frame(cameras: Cameras, points: Tensor, view: int) -> tuple[Cameras, Tensor]:
    """Cameras and points [..., 3] in the frame of one view, which thereby gets the identity pose."""
    return _transformed(cameras, points, torch.linalg.inv(cameras.world_from_cam[view].double()))


def to_object_frame(
    cameras: Cameras, points: Tensor, view: int, radius: float, elevation: float
) -> tuple[Cameras, Tensor]:
    """The same with the origin ``radius`` in front of the view, tilted by 180 - ``elevation`` degrees about x.

    ViewCrafter takes the depth at the centre pixel for the radius and the last of its two copies of a single view.
    """
    shift = torch.eye(4, dtype=torch.float64)
    shift[2, 3] = -radius
    tilt = _turn(0, torch.tensor([180.0 - elevation], dtype=torch.float64))[0]
    return _transformed(cameras, points, tilt @ shift @ torch.linalg.inv(cameras.world_from_cam[view].double()))


def single_view_target(
    anchor: Cameras, frames: int, theta: float, phi: float, r: float, x: float = 0.0, y: float = 0.0
) -> Cameras:
    """``single_view_target``: all five in even steps from 0 to the given value, from one camera in an object frame.

    r counts in units of the anchor's z translation; x and y in scene units (ViewCrafter's option is in pixels: times
    depth over focal length).
    """
    s = torch.linspace(0, 1, frames, dtype=torch.float64)
    return _around(anchor, s * theta, s * phi, s * r, s * x, s * y)


def single_view_txt(
    anchor: Cameras, frames: int, phi: Sequence[float], theta: Sequence[float], r: Sequence[float]
) -> Cameras:
    """``single_view_txt``: knots of each quantity, evenly spread over the path, from one camera in an object frame.

    Two or three knots are joined by lines. More are smoothed (scipy's UnivariateSpline with its default smoothing),
    after which the first and last value are set to what was given. r as in `single_view_target`.
    """
    return _around(anchor, *(_resampled(knots, frames) for knots in (theta, phi, r)))


def read_txt(file: str | Path) -> tuple[list[float], list[float], list[float]]:
    """ViewCrafter's path file: phi, theta and r on a line each, at least two numbers, all beginning with 0.

    Raises UserError for anything else.
    """
    try:
        lines = [line.split() for line in read_text(file).splitlines() if line.strip()]
        phi, theta, r = ([float(word) for word in line] for line in lines)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is no camera path ({error}); write phi, theta and r as three lines of numbers"
        ) from error
    for name, knots in (("phi", phi), ("theta", theta), ("r", r)):
        if len(knots) < 2 or knots[0] != 0 or not np.isfinite(knots).all():
            raise UserError(f"{file}: {name} must have two or more numbers and begin with 0; correct that line")
    return phi, theta, r


def sparse_interpolation(cameras: Cameras, frames: int) -> Cameras:
    """Through V views: (V - 1) (frames - 1) + 1 frames, view k at frame k (frames - 1).

    Between two views, positions run 0, 1/frames, ..., (frames - 2)/frames and then jump to the next view: a step of
    twice the length. Rotations come from straight lines of a point ahead and a point above. Intrinsics run in another
    step, 0, 1/(frames - 2), ..., 1, and so stand still at each view.
    """
    if len(cameras) < 2 or frames < 3:
        raise UserError(
            f"ViewCrafter's interpolation needs two views and three frames, not {len(cameras)} and {frames}; give more"
        )
    pose, matrix = cameras.world_from_cam.double(), cameras.intrinsics.double()
    s = torch.arange(frames - 1, dtype=torch.float64) / frames
    t = torch.linspace(0, 1, frames - 1, dtype=torch.float64)
    center = pose[:, :3, 3]
    ahead, above = center - LOOK_AHEAD * pose[:, :3, 2], center + LOOK_AHEAD * pose[:, :3, 1]
    at, back, up = (torch.cat([_between(points, s), points[-1:]]) for points in (center, ahead, above))

    z = torch.nn.functional.normalize(at - back, dim=-1)
    x = torch.nn.functional.normalize(torch.linalg.cross(up - at, z), dim=-1)
    y = torch.nn.functional.normalize(torch.linalg.cross(z, x), dim=-1)
    path = torch.eye(4, dtype=torch.float64).repeat(len(at), 1, 1)
    path[:, :3, :3], path[:, :3, 3] = torch.stack([x, y, z], dim=-1), at
    return replace(cameras, world_from_cam=path, intrinsics=torch.cat([_between(matrix, t), matrix[-1:]]))


def _between(values: Tensor, s: Tensor) -> Tensor:
    """[V, ...] to [(V - 1) S, ...]: on the line from each to the next, at the parameters s [S]."""
    s = s.reshape(1, -1, *[1] * (values.ndim - 1))
    return torch.lerp(values[:-1, None], values[1:, None], s).flatten(0, 1)


def _resampled(knots: Sequence[float], frames: int) -> Tensor:
    """[frames]: the knots, spread over [0, 1], at ``frames`` even places."""
    from scipy.interpolate import UnivariateSpline  # half a second to import

    given, wanted = np.linspace(0, 1, len(knots)), np.linspace(0, 1, frames)
    if len(knots) <= LINEAR_UP_TO:
        return torch.from_numpy(np.interp(wanted, given, knots))
    values = UnivariateSpline(given, knots, k=3)(wanted)
    values[0], values[-1] = knots[0], knots[-1]
    return torch.from_numpy(values)


def _around(
    anchor: Cameras, theta: Tensor, phi: Tensor, r: Tensor, x: float | Tensor = 0.0, y: float | Tensor = 0.0
) -> Cameras:
    """Add to the translation, turn about x by theta, then about y by phi: all from the left, in the object frame."""
    if len(anchor) != 1:
        raise ValueError(f"ViewCrafter's single-view paths start from one camera, got {len(anchor)}; give cameras[[k]]")
    pose = anchor.world_from_cam.double().repeat(len(theta), 1, 1)
    pose[:, 2, 3] += r * anchor.world_from_cam[0, 2, 3].double()
    pose[:, 1, 3] += y
    pose[:, 0, 3] += x
    intrinsics = anchor.intrinsics.double().repeat(len(theta), 1, 1)
    return replace(anchor, world_from_cam=_turn(1, phi) @ _turn(0, theta) @ pose, intrinsics=intrinsics)


def _turn(axis: int, degrees: Tensor) -> Tensor:
    """[F, 4, 4]: right-handed rotations about a coordinate axis."""
    angle = torch.deg2rad(degrees)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.eye(4, dtype=torch.float64).repeat(len(degrees), 1, 1)
    matrix[:, first, first] = matrix[:, second, second] = angle.cos()
    matrix[:, second, first], matrix[:, first, second] = angle.sin(), -angle.sin()
    return matrix


def _transformed(cameras: Cameras, points: Tensor, motion: Tensor) -> tuple[Cameras, Tensor]:
    """Both under one rigid motion [4, 4] of the world, in their own precision."""
    pose = (motion @ cameras.world_from_cam.double()).to(cameras.world_from_cam)
    moved = points.double() @ motion[:3, :3].T + motion[:3, 3]
    return replace(cameras, world_from_cam=pose), moved.to(points)
