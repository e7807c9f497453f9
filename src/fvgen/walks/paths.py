"""The words that name a camera path: presets with an amount, files of several programs, folders of cameras."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.clips.views import capture_order
from fvgen.errors import UserError, did_you_mean
from fvgen.geometry import trajectories
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.viewcrafter_paths import read_txt, single_view_txt, to_object_frame
from fvgen.scenes.formats import read_scene, scene_format

SAME_POSE = 1e-5  # of a rotation's entries, and of typical depth: two views nearer than this are one
ELEVATION = 5.0  # degrees, ViewCrafter's default: how its single view looks down on the object


class Preset(NamedTuple):
    """``make(camera, frames, amount, depth)``; ``amount``: what is meant if the user gives none, in ``unit``."""

    make: Callable[[Cameras, int, float, float], Cameras]
    amount: float
    unit: str


FROM_ONE: dict[str, Preset] = {  # paths from the first photograph; depth is the distance of what it shows
    "orbit": Preset(lambda c, n, a, d: trajectories.orbit(c, n, a, d), 20.0, "degrees"),
    "spiral": Preset(lambda c, n, a, d: trajectories.spiral(c, n, a * d, d), 0.1, "of the depth"),
    "dolly": Preset(lambda c, n, a, d: trajectories.dolly(c, n, forward=a * d), 0.2, "of the depth"),
    "pan": Preset(lambda c, n, a, d: trajectories.pan(c, n, yaw=a), 15.0, "degrees"),
}
THROUGH = "through"
FOCUS = "focus"  # through them, too, round the point that each pair looks at


class Walk(NamedTuple):
    """cameras: of F frames, float64, at the frames' size. known: frame number -> view of the photograph taken there."""

    cameras: Cameras
    known: dict[int, int]


def default_trajectory(views: int) -> str:
    return THROUGH if views > 1 else "orbit"


def judge_trajectory(words: str) -> None:
    """Raises UserError for words that name no path."""
    name, _, amount = words.partition(":")
    if name in (THROUGH, FOCUS) and not amount:
        return
    if name in FROM_ONE:
        _amount(words)
    elif not Path(words).exists():
        known = [THROUGH, FOCUS, *FROM_ONE]
        raise UserError(f"trajectory {words!r} is neither a known path{did_you_mean(name, known)} nor a file or folder")


def camera_path(
    words: str,
    cameras: Cameras,
    views: list[int],
    frames: int | None,
    clip: int,
    depth: float,
    dataparser_transforms: str | Path | None = None,
) -> Walk:
    """The path that ``words`` name.

    Args:
        cameras: of all photographs, at the frames' size. views: those that "through" visits, in order; paths from one
            photograph begin at the first.
        frames: how many; None: what a file says, ``clip`` from view to view ("through"), or one clip.
        depth: typical distance of what the first view shows, scene units.
    """
    judge_trajectory(words)
    name, size = words.partition(":")[0], (cameras.height, cameras.width)
    start = cameras[[views[0]]].to(dtype=torch.float64)
    if name == THROUGH:
        path = _through(cameras[views].to(dtype=torch.float64), frames, clip)
    elif name == FOCUS:
        path = _round_focus(cameras[views].to(dtype=torch.float64), frames, clip)
    elif name in FROM_ONE:
        path = FROM_ONE[name].make(start, frames or clip, _amount(words), depth)
    elif Path(words).suffix.lower() == ".txt" and Path(words).is_file():
        path = _viewcrafter(Path(words), start, frames or clip, depth)
    else:
        path = _stored(Path(words), size, dataparser_transforms)
        if frames is not None and frames != len(path):
            raise UserError(f"the path {words} has {len(path)} poses, not {frames}; leave --frames out")
    if len(path) < 2:
        raise UserError(f"a walk has at least two frames, the path {words} has {len(path)}; ask for more")
    return Walk(path, _known(path, cameras, depth))


def said(walk: Walk, names: list[str]) -> str:
    """One line for the user: where the path begins, and which way the axes point."""
    begins = f"frame 0 is photograph {names[walk.known[0]]}" if 0 in walk.known else "frame 0 is no photograph"
    others = len(walk.known) - (0 in walk.known)
    return (
        f"{len(walk.cameras)} frames; {begins}, {others} other photographs on the path; axes x right, y down, z forward"
    )


def _through(cameras: Cameras, frames: int | None, clip: int) -> Cameras:
    if len(cameras) < 2:
        raise UserError("a path through photographs needs two of them; give another, or choose --trajectory orbit")
    whole = (len(cameras) - 1) * (clip - 1) + 1
    if frames is not None and frames != whole:
        return trajectories.interpolate(cameras, frames)
    # Every clip runs from photograph to photograph, as FVGen's.
    return trajectories.interpolate(cameras, whole, range(0, whole, clip - 1))


def _round_focus(cameras: Cameras, frames: int | None, clip: int) -> Cameras:
    """From view to view, ``clip`` frames each with both ends; ``frames`` in all spread evenly over the pairs."""
    pairs = len(cameras) - 1
    if pairs < 1:
        raise UserError("a path round a focus point needs two photographs; give another, or choose --trajectory orbit")
    whole = pairs * (clip - 1) if frames is None else frames - 1
    if whole < pairs:
        raise UserError(f"a path through {pairs + 1} photographs cannot have {frames} frames; ask for more")
    keys = [round(pair * whole / pairs) for pair in range(pairs + 1)]
    parts = [
        trajectories.focus_point(cameras[[pair, pair + 1]], end - start + 1)
        for pair, (start, end) in enumerate(pairwise(keys))
    ]
    poses, matrices = (
        torch.cat([getattr(part, name)[int(place > 0) :] for place, part in enumerate(parts)])
        for name in ("world_from_cam", "intrinsics")
    )
    return replace(cameras, world_from_cam=poses, intrinsics=matrices)


def _stored(path: Path, size: tuple[int, int], dataparser_transforms: str | Path | None) -> Cameras:
    if path.is_dir():
        if not scene_format(path):
            raise UserError(f"the path {path} is a folder without cameras; give one with transforms.json or sparse/0")
        scene = read_scene(path)
        return scene.cameras[capture_order(scene)].to(dtype=torch.float64).fitted(*size)
    beside = path.parent / "dataparser_transforms.json"
    return trajectories.read_path(path, *size, dataparser_transforms or (beside if beside.exists() else None))


def _viewcrafter(file: Path, start: Cameras, frames: int, depth: float) -> Cameras:
    """ViewCrafter's txt, which counts from the object frame ``depth`` before the first photograph."""
    anchor, _ = to_object_frame(start, torch.empty(0, 3), 0, depth, ELEVATION)
    phi, theta, r = read_txt(file)
    moved = single_view_txt(anchor, frames, phi, theta, r)
    # world <- object: the same motion that takes the anchor back to the photograph
    back = start.world_from_cam[0] @ torch.linalg.inv(anchor.world_from_cam[0].double())
    poses = back @ moved.world_from_cam
    poses[0] = start.world_from_cam[0]
    return replace(moved, world_from_cam=poses)


def _known(path: Cameras, cameras: Cameras, depth: float) -> dict[int, int]:
    """Frames that are photographs: same pose, same lens."""
    pose, given = path.world_from_cam[:, None].double(), cameras.world_from_cam[None].double()
    turn = (pose[..., :3, :3] - given[..., :3, :3]).abs().amax((-1, -2))
    away = (pose[..., :3, 3] - given[..., :3, 3]).norm(dim=-1)
    lens = _lens_gap(path.intrinsics, cameras.intrinsics)
    same = (turn < SAME_POSE) & (away < SAME_POSE * depth) & (lens < 0.01)
    return {frame: int(same[frame].int().argmax()) for frame in range(len(path)) if same[frame].any()}


def _lens_gap(a: Tensor, b: Tensor) -> Tensor:
    return ((a[:, None].double() - b[None].double()).abs() / b[None, :, :1, :1].double()).amax((-1, -2))


def _amount(words: str) -> float:
    name, colon, text = words.partition(":")
    if not colon:
        return FROM_ONE[name].amount
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0 or abs(value) > 360:
        row = FROM_ONE[name]
        raise UserError(
            f"--trajectory {words!r} is not understood; write, for example, {name}:{row.amount:g} ({row.unit})"
        )
    return value
