"""Clips from posed photographs: which views, in which order, and a point cloud that tells nothing of others.

The first and last view of a clip are known, those between are to be synthesised. What leaves `scene_cloud`
comes from the known photographs alone, except for one thing: the positions of triangulated points, which
structure-from-motion solved for with all images. Colours never do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fvgen.data.posed import Scene
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, fit_box, project
from fvgen.geometry.pointcloud import unproject

# Radians of turn and parallax along a whole clip: on longer ones neither end shows much of the middle.
LONGEST = 1.5
# Radians from one frame to the next: beyond it the two hardly share anything, and there is no path.
JUMP = 1.5
# Paths whose score is within this factor of the best are drawn with equal chance.
AS_GOOD = 1.4
# Entries in the step costs of all paths that are tried: 48 MB, and twice that while they are summed.
TABLE = 6_000_000


class PhotoClip(NamedTuple):
    """A clip to be rendered: truth [F, 3, H, W] and colours [N, 3] in [0, 1], points [N, 3] in the world.

    known: the frames that the points come from.
    """

    name: str
    truth: Tensor
    cameras: Cameras
    points: Tensor
    colors: Tensor
    known: tuple[int, ...]


def scene_clips(
    scene: Scene, count: int, frames: int, height: int, width: int, seed: int, half_pixel_shift: bool = False
) -> list[PhotoClip]:
    """``count`` different clips of a scene, named NAME-00 and so on; the same seed gives the same clips.

    The cloud of each comes from its first and last frame: see `scene_cloud`, and `unproject` for the shift.
    Raises UserError when the scene has too few views, or neither depth maps nor points.
    """
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for index, views in enumerate(choose_views(scene, frames, count, generator)):
        name = f"{scene.name}-{index:02d}"
        clips.append(photo_clip(scene, name, views, (0, frames - 1), height, width, half_pixel_shift))
    return clips


def photo_clip(
    scene: Scene,
    name: str,
    views: Sequence[int],
    known: Sequence[int],
    height: int,
    width: int,
    half_pixel_shift: bool = False,
    depth: Tensor | None = None,
) -> PhotoClip:
    """The clip of these views, cut to height x width, with a cloud of its ``known`` frames (places in ``views``).

    depth: [K, height, width] of the known frames, as `point_maps` gives it; None takes what came with the scene, depth
    maps or points (`scene_cloud`). Raises UserError for damaged photographs, and where no point is left.
    """
    views, known = list(views), list(known)
    truth = torch.stack([fit_image(scene.image(view), height, width) for view in views])
    cameras = scene.cameras[views].fitted(height, width)
    if depth is None:
        points, colors = scene_cloud(scene, [views[frame] for frame in known], truth[known], half_pixel_shift)
    else:
        points, colors = unproject(depth, truth[known], cameras[known], half_pixel_shift)
    return PhotoClip(name, truth, cameras, points, colors, tuple(known))


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


# --- Images and clouds ---


def fit_image(image: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [H0, W0, 3] to float [3, height, width] in [0, 1]: the crop of `fit_box`, resized, antialiased.

    `Cameras.fitted` describes the same change.
    """
    old_height, old_width = image.shape[:2]
    left, top, right, bottom = fit_box(old_height, old_width, height, width)
    box = (max(left, 0.0), max(top, 0.0), min(right, old_width), min(bottom, old_height))  # rounding
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def scene_cloud(
    scene: Scene, known: Sequence[int], images: Tensor, half_pixel_shift: bool = False
) -> tuple[Tensor, Tensor]:
    """Points [N, 3] and colours [N, 3] in [0, 1] from the known views; ``images`` [K, 3, H, W] are theirs.

    With depth maps: every pixel of the known views, at the size of ``images``, with or without ViewCrafter's
    half-pixel shift (`unproject`), which triangulated points never have. Without depth maps: the triangulated
    points that were found in a known view, coloured by bilinear look-up there (the mean, if several show a
    point). Left out are points that only other views found, for nothing tells whether they are hidden here,
    and COLMAP's own colours, which average over all photographs. Raises UserError when no point is left.
    """
    height, width = images.shape[-2:]
    cameras = scene.cameras[list(known)].fitted(height, width)
    if scene.depth_paths is not None:
        depths = [scene.depth(view) for view in known]
        fitted = torch.stack([fit_depth(depth, height, width) for depth in depths])
        return unproject(fitted, images, cameras, half_pixel_shift)
    if scene.points is None:
        raise UserError(
            f"scene {scene.name} has neither depth maps nor points, so nothing can be rendered; add "
            "depth_file_path to transforms.json, or sparse/0 with points3D (`colmap point_triangulator`)"
        )
    pixels, depth = project(scene.points, cameras)
    unit = 2 * pixels / pixels.new_tensor([width, height]) - 1  # the image spans -1..1
    seen = torch.stack([scene.seen_by(view) for view in known])
    seen &= (unit.abs() < 1).all(-1) & (depth > 0)
    color = torch.nn.functional.grid_sample(images, unit[:, None], padding_mode="border", align_corners=False)
    weight = seen.float()[..., None]  # [K, N, 1]
    mean = (color[:, :, 0].transpose(1, 2) * weight).sum(0) / weight.sum(0).clamp(min=1)
    found = seen.any(0)
    if not found.any():
        names = " nor ".join(scene.image_paths[view].name for view in known)
        raise UserError(
            f"scene {scene.name} has no point that was found in {names}, so nothing can be rendered; "
            "check the tracks in points3D or add depth maps"
        )
    return scene.points[found], mean[found].clamp(0, 1)


def fit_depth(depth: Tensor, height: int, width: int) -> Tensor:
    """[H0, W0] to [height, width] as in `fit_image`, but from the nearest pixel: depths must not be mixed."""
    left, top, right, bottom = fit_box(*depth.shape, height, width)
    x = left + (torch.arange(width) + 0.5) * (right - left) / width
    y = top + (torch.arange(height) + 0.5) * (bottom - top) / height
    return depth[y.long()[:, None], x.long()[None]]
