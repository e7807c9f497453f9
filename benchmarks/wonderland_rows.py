"""What an image or a clip gives without a network that was trained for it: the rows that Wonderland's have to beat in
benchmarks/wonderland.py, and how both are scored.

Every row is a function of a clip's frames to views [V, 3, H, W] in [0, 1] at cameras off its path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fvgen.clips.clip import Clip
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.closing import closed
from fvgen.geometry.gaussians import Gaussians
from fvgen.geometry.pointcloud import render_points, unproject
from fvgen.metrics import psnr, score_images
from fvgen.metrics.cameras import rotation_angle
from fvgen.metrics.pose_matching import Render, match_poses, matched_errors
from fvgen.splats.fitting import FitSettings, drawer, fit, seeds

WARP_RADIUS = 0.86
"""Pixels, of the points that carry an image: the best of six sizes at 24 views of six rooms (21.9 dB; 17.6 at the 2.9
of closed renders, 20.9 at 0.58). Below one pixel each point covers its own pixel alone where nothing moves."""
MOST_SEEDS = 4000  # Gaussians at the start of a fit
TRIAL = 5  # iterations that say how many fit into the seconds
DEPTHS = (0.1, 1.0)  # of a fit that knows none: shares of `FAR` along the frames' rays
FAR = 4.0  # path extents; a room's walls seldom are farther


# --- Views off the path ---


def warped(image: Tensor, depth: Tensor, camera: Cameras, views: Cameras) -> Tensor:
    """The ``image`` [3, H, W] of one camera, carried by its true ``depth`` [H, W]; holes are filled with the colour of
    the nearest pixel (`fvgen.geometry.closing`)."""
    points, colors = unproject(depth[None], image[None], camera)
    drawn, opacity, _ = render_points(points, colors, views, 2 * WARP_RADIUS / min(views.height, views.width))
    return closed(drawn.permute(0, 3, 1, 2).clamp(0, 1), opacity)


def nearest(frames: Tensor, cameras: Cameras, views: Cameras) -> Tensor:
    """The frame [F, 3, H, W] whose camera is nearest, see `apart`."""
    return frames[apart(cameras, views).argmin(dim=1)]


def cross_fade(frames: Tensor, cameras: Cameras, views: Cameras) -> Tensor:
    """The two nearest frames laid over each other, each weighed by how far the view is from the other."""
    away, two = apart(cameras, views).topk(2, dim=1, largest=False)
    weight = (away[:, 1] / away.sum(dim=1).clamp(min=1e-12)).float().view(-1, 1, 1, 1)
    return torch.lerp(frames[two[:, 1]], frames[two[:, 0]], weight)


def apart(cameras: Cameras, views: Cameras) -> Tensor:
    """[V, F] of views and frames: the angle between them in radians, plus the distance in extents of the path."""
    centers = cameras.centers.double()
    extent = torch.cdist(centers, centers).max().clamp(min=1e-12)
    turn = rotation_angle(views.world_from_cam[:, None, :3, :3].double(), cameras.world_from_cam[None, :, :3, :3])
    return turn + torch.cdist(views.centers.double(), centers) / extent


def fitted(
    frames: Tensor, cameras: Cameras, seconds: float, depth: Tensor | None = None, seed: int = 0
) -> tuple[Gaussians, dict[str, float]]:
    """Gaussians fitted to the frames in about so many ``seconds`` (at least one iteration), and what was done.

    They start on the frames' surfaces where ``depth`` [F, H, W] is known, else anywhere along their rays.
    """
    generator = torch.Generator().manual_seed(seed)
    if depth is None:
        extent = torch.cdist(cameras.centers, cameras.centers).max()
        low, high = DEPTHS
        share = low + (high - low) * torch.rand(frames[:, 0].shape, generator=generator)
        depth = FAR * extent * share
    start = seeds(*unproject(depth, frames, cameras), MOST_SEEDS, generator)
    clock = time.perf_counter()
    fit(frames, cameras, start, FitSettings(iterations=TRIAL), seed=seed)
    each = (time.perf_counter() - clock) / TRIAL
    iterations = max(1, round(seconds / each))
    clock = time.perf_counter()
    made = fit(frames, cameras, start, FitSettings(iterations=iterations), seed=seed)
    return made, {"iterations": iterations, "seconds": time.perf_counter() - clock}


def shown(made: Gaussians, views: Cameras) -> Tensor:
    """Gaussians at the views' cameras."""
    draw = drawer("cpu")
    return torch.cat([draw(made, views[[view]]) for view in range(len(views))]).clamp(0, 1)


# --- Scores ---


def score_views(images: Sequence[Tensor], clips: Sequence[Clip], seconds: Sequence[float]) -> dict[str, Any]:
    """Views off the paths of ``clips``, one tensor each, against the true ones; ``seconds``: a scene."""
    scores = score_images(torch.cat(list(images)), torch.cat([clip.others.images for clip in clips]))
    return scores | {"seconds_per_scene": sum(seconds) / len(seconds)}


def score_path(video: Tensor, clip: Clip, render: Render) -> dict[str, float | None]:
    """How far the cameras of a video [F, 3, H, W] are from those asked for, `matched_errors`."""
    return matched_errors(match_poses(video, clip.cameras, render), clip.cameras)


def score_guided(
    asked: Sequence[Tensor], shuffled: Sequence[Tensor], clips: Sequence[Clip], renders: Sequence[Render]
) -> dict[str, Any]:
    """Videos of the asked paths: image metrics of all frames but the first, which is given; cameras by pose matching,
    means over the frames that were found ("_all": over all); and ``camera_gain``, the dB that the right path gives over
    another clip's (``shuffled``)."""
    truth = [clip.truth[1:] for clip in clips]
    scores = score_images(torch.cat([video[1:] for video in asked]), torch.cat(truth))
    paths = [score_path(*each) for each in zip(asked, clips, renders, strict=True)]
    lost = [path["failures"] for path in paths]
    frames = [len(t) for t in truth]
    found = [count - none for count, none in zip(frames, lost, strict=True)]
    for name in paths[0]:
        whole = name.endswith("_all") or name == "residual"
        scores[name] = weighted([path[name] for path in paths], frames if whole else found)
    scores["failures"] = sum(lost)
    right, wrong = (torch.cat([psnr(v[1:], t) for v, t in zip(x, truth, strict=True)]) for x in (asked, shuffled))
    return scores | {"camera_gain": (right - wrong).mean().item(), "frames": sum(frames)}


def weighted(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """The mean; None where all weights are 0. What weighs nothing may be None."""
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    return sum(value * weight for value, weight in pairs) / sum(weights) if pairs else None


def by_clip(row: Callable[[Clip], Tensor], clips: Sequence[Clip]) -> dict[str, Any]:
    """Scores of a row that makes a clip's views at its `others` cameras."""
    images, seconds = [], []
    for clip in clips:
        clock = time.perf_counter()
        images.append(row(clip))
        seconds.append(time.perf_counter() - clock)
    return score_views(images, clips, seconds)
