"""Posed photographs: which views make a path, and images and depths cut to the size of a clip."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, fit_box
from fvgen.scenes.scene import Scene

# Radians of turn and parallax along a whole clip: on longer ones neither end shows much of the middle.
LONGEST = 1.5
# Radians from one frame to the next: beyond it the two hardly share anything, and there is no path.
JUMP = 1.5
# Paths whose score is within this factor of the best are drawn with equal chance.
AS_GOOD = 1.4
# Entries in the step costs of all paths that are tried: 48 MB, and twice that while they are summed.
TABLE = 6_000_000


# --- Choice of views ---


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


# --- Images ---


def fit_image(image: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [H0, W0, 3] to float [3, height, width] in [0, 1]: the crop of `fit_box`, resized, antialiased.

    `Cameras.fitted` describes the same change.
    """
    old_height, old_width = image.shape[:2]
    left, top, right, bottom = fit_box(old_height, old_width, height, width)
    box = (max(left, 0.0), max(top, 0.0), min(right, old_width), min(bottom, old_height))  # rounding
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def fit_depth(depth: Tensor, height: int, width: int) -> Tensor:
    """[H0, W0] to [height, width] as in `fit_image`, but from the nearest pixel: depths must not be mixed."""
    left, top, right, bottom = fit_box(*depth.shape, height, width)
    x = left + (torch.arange(width) + 0.5) * (right - left) / width
    y = top + (torch.arange(height) + 0.5) * (bottom - top) / height
    return depth[y.long()[:, None], x.long()[None]]
