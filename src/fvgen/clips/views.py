"""Which views of a scene make a clip: windows of the order of capture with a random stride, as FVGen (section 5.1) has
them, or, for photographs that were not taken along a path, paths by pose.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.scenes.scene import Scene

# A window with a higher `path_score` is no path that one would film: it jumps, or goes on long after its start is out
# of sight.
HIGHEST_SCORE = 4.0
# Radians of turn and parallax along a whole clip: on longer ones neither end shows much of the middle.
LONGEST = 1.5
# Radians from one frame to the next: beyond it the two hardly share anything, and there is no path.
JUMP = 1.5
# Paths whose score is within this factor of the best are drawn with equal chance.
AS_GOOD = 1.4
# Radians from a clip's nearest frame: photographs further away show more that the clip does not than what it does.
NEARBY = JUMP / 2
# Entries in the step costs of all paths that are tried: 48 MB, and twice that while they are summed.
TABLE = 6_000_000


# --- Windows of the order of capture ---


class Window(NamedTuple):
    """views: [F] in the clip's order; stride: views from one to the next in the order of capture, None: by pose;
    motion: length of the path in radians, turn and parallax (`pose_distance`)."""

    views: list[int]
    stride: int | None
    motion: float


def clip_windows(scene: Scene, count: int, frames: int, max_stride: int, generator: torch.Generator) -> list[Window]:
    """Up to ``count`` different clips of a scene.

    Each draws a stride of 1..max_stride evenly among those for which smooth windows are left, then one of these, then
    its direction. Where the order of capture gives no smooth window at all, `choose_views` chooses by pose. Raises
    UserError where that cannot either.
    """
    distance = pose_distance(scene.cameras, typical_depth(scene))
    order = torch.tensor(capture_order(scene))
    windows = {stride: _smooth(distance, order, frames, stride) for stride in range(1, max_stride + 1)}
    chosen: list[tuple[Tensor, int | None]] = []
    while len(chosen) < count and (left := [stride for stride in windows if len(windows[stride])]):
        stride = left[_draw(len(left), generator)]
        place = _draw(len(windows[stride]), generator)
        views = windows[stride][place]
        windows[stride] = torch.cat([windows[stride][:place], windows[stride][place + 1 :]])
        chosen.append((views.flip(0) if _draw(2, generator) else views, stride))
    if not chosen:
        chosen = [(torch.tensor(views), None) for views in choose_views(scene, frames, count, generator, at_most=True)]
    return [Window(v.tolist(), stride, distance[v[:-1], v[1:]].sum().item()) for v, stride in chosen]


def capture_order(scene: Scene) -> list[int]:
    """The views by file name, numbers in it by value: how cameras and video tools number what they write."""

    def key(view: int) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", scene.image_paths[view].as_posix())
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    return sorted(range(len(scene)), key=key)


def _smooth(distance: Tensor, order: Tensor, frames: int, stride: int) -> Tensor:
    """[P, F] views: the windows of a stride that are smooth paths."""
    reach = (frames - 1) * stride
    starts = torch.arange(max(0, len(order) - reach))
    paths = order[starts[:, None] + stride * torch.arange(frames)]
    return paths[path_score(distance, paths) <= HIGHEST_SCORE]


def _draw(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))


def other_views(distance: Tensor, views: list[int], count: int, generator: torch.Generator) -> list[int]:
    """``count`` views that are not in a clip of ``views`` but within NEARBY of one of its frames, drawn at random;
    fewer where there are no more. ``distance``: `pose_distance` of the scene."""
    near = distance[:, views].amin(dim=1) < NEARBY
    near[views] = False
    candidates = near.nonzero().flatten()
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]].tolist()


# --- Paths by pose ---


def choose_views(
    scene: Scene, frames: int, count: int, generator: torch.Generator, at_most: bool = False
) -> list[list[int]]:
    """``count`` different smooth paths of ``frames`` distinct views each, by pose and never by file order.

    With ``at_most`` fewer will do, but not none.
    Every pair of views is tried as the ends of a path; `_paths` fills in those between. A path's score is its
    largest step over the step of an even, straight one, (F-1) max d / span, times length / LONGEST if it is
    longer than that: jumps, detours and clips whose middle neither end sees all cost. Paths with a step over
    JUMP are out. Of those within AS_GOOD of the best, ``count`` are drawn, each in a random direction, and if
    they are too few, the next best follow. Raises UserError when the scene cannot give that many.
    """
    assert frames >= 2 and count >= 1, (frames, count)
    views = len(scene)
    if views < frames:
        raise UserError(
            f"scene {scene.name} has {views} views but a clip needs {frames} frames; "
            "ask for fewer frames or add photographs"
        )
    distance = pose_distance(scene.cameras, typical_depth(scene))
    pairs = torch.combinations(torch.arange(views))
    pairs = pairs[distance[pairs[:, 0], pairs[:, 1]] > 1e-6]
    reach = min(views, 4 * frames)
    limit = TABLE // reach**2
    if len(pairs) > limit:
        pairs = pairs[torch.randperm(len(pairs), generator=generator)[:limit]]
    paths = _paths(distance, pairs, frames, reach)
    score = path_score(distance, paths)
    paths, score = paths[score.isfinite()], score[score.isfinite()]
    if at_most:
        count = max(1, min(count, len(paths)))
    if len(paths) < count:
        raise UserError(
            f"scene {scene.name} gives {len(paths)} clips of {frames} frames without jumps, not {count}; "
            "ask for fewer clips or frames, or add photographs between the others"
        )
    best = score.argsort(stable=True)
    good = int((score <= AS_GOOD * score.min()).sum())
    best[:good] = best[torch.randperm(good, generator=generator)]
    turned = torch.rand(count, generator=generator) < 0.5
    chosen = torch.where(turned[:, None], paths[best[:count]].flip(1), paths[best[:count]])
    return chosen.tolist()


def pose_distance(cameras: Cameras, depth: float) -> Tensor:
    """[V, V] float64, radians: angle between two orientations plus parallax (baseline / typical depth)."""
    rotation, center = cameras.world_from_cam[:, :3, :3].double(), cameras.centers.double()
    # For rotations |R - S| = sqrt(8) sin(angle / 2): exact at small angles, where the arc cosine is not.
    chord = torch.cdist(rotation.flatten(1), rotation.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    baseline = torch.cdist(center, center, compute_mode="donot_use_mm_for_euclid_dist")
    return 2 * (chord / 8**0.5).clamp(max=1).asin() + baseline / depth


def typical_depth(scene: Scene) -> float:
    """Median depth of the points as the cameras see them, else of a depth map, else the cameras' extent."""
    cameras = scene.cameras
    if scene.points is not None and scene.observations is not None:
        point, view = scene.observations.unbind(1)
        depth = ((scene.points[point] - cameras.centers[view]) * cameras.world_from_cam[view, :3, 2]).sum(-1)
    elif scene.depth_paths is not None:
        depth = scene.depth(0)
    else:
        depth = torch.cdist(cameras.centers, cameras.centers).max().reshape(1)
    depth = depth[depth > 0]
    return depth.median().item() if len(depth) else 1.0


def _paths(distance: Tensor, pairs: Tensor, frames: int, reach: int) -> Tensor:
    """[P, F] views: between each pair of ends [P, 2], the path with the least sum of squared steps.

    Only the ``reach`` views with the smallest detour between the ends are candidates, ordered by progress
    d(start, v) / (d(start, v) + d(v, end)). A path may skip candidates but never turn back, so the best one
    is found exactly, by dynamic programming over that order.
    """
    start, end = pairs.unbind(1)
    row = torch.arange(len(pairs))
    detour = distance[start] + distance[end]
    detour[row, start] = detour[row, end] = -1  # the ends are always candidates
    near = detour.topk(reach, largest=False).indices
    from_start, to_end = distance[start[:, None], near], distance[end[:, None], near]
    progress = from_start / (from_start + to_end)
    progress[near == start[:, None]], progress[near == end[:, None]] = -1.0, 2.0
    order = near.gather(1, progress.argsort(dim=1, stable=True))

    cost = distance[order[:, :, None], order[:, None, :]] ** 2
    cost.masked_fill_(torch.ones(reach, reach, dtype=torch.bool).tril(), torch.inf)
    total = torch.full((len(pairs), reach), torch.inf, dtype=distance.dtype)
    total[:, 0] = 0
    came_from = []
    for _ in range(frames - 1):
        total, previous = (total[:, :, None] + cost).min(dim=1)
        came_from.append(previous)
    place = [torch.full_like(row, reach - 1)]
    for previous in reversed(came_from):
        place.append(previous[row, place[-1]])
    return order.gather(1, torch.stack(place[::-1], dim=1))


def path_score(distance: Tensor, paths: Tensor) -> Tensor:
    """[P], at least 1, smaller is smoother, infinite where a step is beyond JUMP: see `choose_views`."""
    steps = distance[paths[:, :-1], paths[:, 1:]]
    span = distance[paths[:, 0], paths[:, -1]]
    largest = steps.amax(1)
    score = steps.shape[1] * largest / span * (steps.sum(1) / LONGEST).clamp(min=1)
    return score.masked_fill(largest > JUMP, torch.inf)
