"""What ViewCrafter does with DUSt3R's confidences before it draws the points, as pure functions.

Facts: DUSt3R's global alignment and ViewCrafter's sparse-view script, recorded in the tests. Confidences are DUSt3R's
raw ones, 1 and up; 0 is a point that `clean_confidence` took out. Cameras have DUSt3R's pixels: integer coordinates are
pixel centres and the principal point is (W/2, H/2), see `unproject`'s ``half_pixel_shift``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras, project

LEAST = math.log(3.0)  # meant for the logarithm of the confidence, but both programs compare the raw one with it
TOLERANCE = 1e-3  # of the depth
MARGIN = 40  # rows at the top and at the bottom that `viewcrafter_mask` does not look at


def fused_confidence(edges: Sequence[tuple[int, int]], first: Tensor, second: Tensor, views: int) -> Tensor:
    """[V, H, W]: of each view the largest confidence, pixel by pixel, over all edges that have it.

    edges: E directed pairs of views; first, second: [E, H, W] confidences of the one and of the other view.
    """
    out = first.new_zeros(views, *first.shape[1:])
    for (i, j), one, other in zip(edges, first, second, strict=True):
        out[i] = torch.maximum(out[i], one)
        out[j] = torch.maximum(out[j], other)
    return out


def clean_confidence(confidence: Tensor, depth: Tensor, points: Tensor, cameras: Cameras) -> Tensor:
    """[V, H, W]: 0 for points that hang before what another view is surer of, else as it was.

    A point of view i falls on a pixel of view j (to the nearest whole number). If it lies more than `TOLERANCE` before
    that pixel's depth and is less confident than it, it goes. In order of i, then j: later tests see earlier zeros.

    Args:
        confidence, depth: [V, H, W], camera z.
        points: [V, H, W, 3] in the world.
    """
    out = confidence.clone()
    height, width = confidence.shape[1:]
    for i in range(len(out)):
        pixels, ahead = project(points[i].reshape(-1, 3), cameras)
        for j in range(len(out)):
            if i == j:
                continue
            x, y = pixels[j].round().unbind(-1)
            inside = (ahead[j] > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            flat = torch.where(inside, y * width + x, 0).long()
            before = ahead[j] < (1 - TOLERANCE) * depth[j].flatten()[flat]
            less = out[i].flatten() < out[j].flatten()[flat]
            out[i][(inside & before & less).reshape(height, width)] = 0
    return out


def viewcrafter_mask(confidence: Tensor, depth: Tensor, background: float | None = None) -> Tensor:
    """[V, H, W] bool, the points that are drawn: sure enough, *or* far enough.

    Far is beyond ``background`` times the sum of the largest and the smallest depth of the view without its first and
    last `MARGIN` rows (images of more than 80 rows). ViewCrafter's sparse-view script says 0.2, which keeps everything
    unless something is very near; None leaves the second test out.
    """
    keep = confidence > LEAST
    if background is None:
        return keep
    if depth.shape[1] <= 2 * MARGIN:
        raise ValueError(f"viewcrafter_mask needs images of more than {2 * MARGIN} rows, not {depth.shape[1]}")
    inner = depth[:, MARGIN:-MARGIN].flatten(1)
    limit = background * (inner.amax(1) + inner.amin(1))
    return keep | (depth > limit[:, None, None])


def clip_depth(depth: Tensor, share: float = 1.0) -> Tensor:
    """[V, H, W] depths, none above ``share`` of the largest of all views. ViewCrafter's default, 1, changes nothing."""
    return depth.clamp(max=share * depth.max())
