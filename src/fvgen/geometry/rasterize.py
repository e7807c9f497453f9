"""PyTorch3D's point rasteriser and alpha compositor in plain torch, on a CPU equal to the last bit.

Facts (rules, order of float operations): facebookresearch/pytorch3d @ 9381c40, its C++ kernels for the CPU. A point
covers the pixels whose centres lie nearer than ``radius``; the ``points_per_pixel`` points with the smallest
(depth, index) stay; each is laid over those behind it with opacity 1 - distance^2 / radius^2.

Normalised device coordinates (NDC): +x left, +y up, the image's short side spans [-1, 1]; z is the camera's depth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Candidate (point, pixel) pairs looked at together: bounds the working memory, about 40 bytes each.
CANDIDATES = 1 << 21
# Pixels that the window of candidates is wider than the disk on each side: float32 places a point to 1e-3 pixels.
MARGIN = 0.01


def rasterize_points(
    points_ndc: Tensor, image_size: tuple[int, int], radius: float, points_per_pixel: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest points of every pixel, as PyTorch3D's ``rasterize_points`` gives them (its CPU, ``bin_size=0``).

    points_ndc: [V, N, 3]; image_size: (H, W); radius in NDC. Points with depth < 0 or a NaN are not drawn, depth 0 is.
    Returns idx [V, H, W, K] int64 (view * N + point), zbuf and dists (squared distance) [V, H, W, K], by ascending
    depth, equal depths by index, -1 where there is no point. Raises ValueError for what cannot be drawn at all.
    """
    height, width = image_size
    if points_ndc.ndim != 3 or points_ndc.shape[-1] != 3:
        raise ValueError(f"points_ndc must be [V, N, 3], got {list(points_ndc.shape)}")
    check_settings(image_size, radius, points_per_pixel)
    views, count = points_ndc.shape[:2]
    shape = (views, height, width, points_per_pixel)
    idx = torch.empty(shape, dtype=torch.int64, device=points_ndc.device)
    zbuf, dists = (torch.empty(shape, dtype=points_ndc.dtype, device=points_ndc.device) for _ in range(2))
    for view, points in enumerate(points_ndc):
        layers = rasterize_view(points, image_size, radius, points_per_pixel)
        index, depth, distance = (layer.movedim(0, -1) for layer in layers)
        idx[view] = torch.where(index >= 0, index + view * count, -1)
        zbuf[view], dists[view] = depth, distance
    return idx, zbuf, dists


def check_settings(image_size: tuple[int, int], radius: float, points_per_pixel: int) -> None:
    """Raises ValueError for an image, radius or number of points that cannot be."""
    if min(image_size) < 1:
        raise ValueError(f"image_size is (height, width), both at least 1, got {tuple(image_size)}")
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius must be a positive number (the image's short side spans 2), got {radius}")
    if points_per_pixel < 1:
        raise ValueError(f"points_per_pixel must be at least 1, got {points_per_pixel}")


@torch.no_grad()
def rasterize_view(
    points: Tensor, image_size: tuple[int, int], radius: float, points_per_pixel: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`rasterize_points` for one view [N, 3]: point [K, H, W] int64, depth and squared distance [K, H, W], or -1.

    Points are drawn front to back, as many at once as memory allows, until every pixel has its K.
    """
    height, width = image_size
    shape = (points_per_pixel, height, width)
    point = torch.full((math.prod(shape),), -1, dtype=torch.int64, device=points.device)
    distance = torch.full(point.shape, -1.0, dtype=points.dtype, device=points.device)
    filled = torch.zeros(height * width, dtype=torch.int64, device=points.device)

    columns, left = _window(points[:, 0], width, min(image_size), radius)
    rows, top = _window(points[:, 1], height, min(image_size), radius)
    drawn = ((points[:, 2] >= 0) & (left >= 0) & (top >= 0)).nonzero()[:, 0]
    drawn = drawn[(points[drawn, 2] + 0.0).argsort(stable=True)]  # + 0.0: -0.0 and 0.0 are one depth on a GPU, too
    radius = torch.tensor(radius, dtype=points.dtype, device=points.device)
    reach = radius * radius
    x_of, y_of = pixel_centers(width, height, points), pixel_centers(height, width, points)
    column, row = (torch.arange(n, dtype=torch.int32, device=points.device) for n in (columns, rows))
    rank = torch.arange(points_per_pixel, device=points.device)[:, None]

    for some in drawn.split(max(1, CANDIDATES // (columns * rows))):
        x, y = _take(left, some)[:, None] + column, _take(top, some)[:, None] + row  # [n, columns], [n, rows]
        dx, dy = _take(x_of, x) - points[some, :1], _take(y_of, y) - points[some, 1:2]
        square = ((dx * dx)[:, None] + (dy * dy)[:, :, None]).flatten()  # [n * rows * columns]
        hit = (square < reach).nonzero()[:, 0]
        cell = _take(((y * width)[:, :, None] + x[:, None]).flatten(), hit)
        order = cell.argsort(stable=True)  # within a pixel still front to back
        count = torch.bincount(cell, minlength=height * width)
        place, pixel = ((rank < count) & (rank + filled < points_per_pixel)).nonzero().unbind(1)
        source = _take(hit, _take(order, _take(count.cumsum(0) - count, pixel) + place))
        slot = (_take(filled, pixel) + place) * height * width + pixel
        point[slot] = _take(some, source // (columns * rows))
        distance[slot] = _take(square, source)
        filled += count
        if bool((filled >= points_per_pixel).all()):
            break

    # With no point at all there is nothing to look up.
    depth = torch.where(point >= 0, _take(points[:, 2], point.clamp(min=0)), -1.0) if len(points) else distance.clone()
    return point.reshape(shape), depth.reshape(shape), distance.reshape(shape)


def pixel_centers(size: int, other: int, like: Tensor) -> Tensor:
    """[size] NDC of the pixel centres along one side of an image, ``other`` being the second: PyTorch3D's PixToNdc."""
    span = like.new_tensor(2.0 * size) / other if size > other else like.new_tensor(2.0)  # rounded in like.dtype
    offset = span / 2
    count = torch.arange(size - 1, -1, -1, dtype=like.dtype, device=like.device)
    return -offset + (span * count + offset) / size


def _window(position: Tensor, size: int, short: int, radius: float) -> tuple[int, Tensor]:
    """How many pixels of a row (or column) a disk can reach, and the first of them [N] int32, -1 if none."""
    reach = radius * short / 2 + MARGIN
    count = min(size, math.floor(2 * reach) + 1)
    pixel = size / 2 - position * (short / 2)  # OpenCV's u or v: pixel i is centred at i + 0.5
    inside = (pixel > -reach) & (pixel < size + reach)
    first = (pixel - reach - 0.5).ceil().clamp(0, size - count)
    return count, torch.where(inside, first, -1.0).int()


def _take(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` for [N] values, three times as fast on a CPU."""
    return values.index_select(0, index.flatten()).reshape(index.shape)


def composite(
    point: Tensor, distance: Tensor, colors: Tensor, radius: float, background: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Alpha-composite one view, front to back: PyTorch3D's AlphaCompositor with weights 1 - distance / radius^2.

    point, distance: [K, H, W] of `rasterize_view`; colors: [N, C]; background: [C], shown only where there is no
    point at all (transparency is not filled up with it). Returns image [H, W, C] and opacity [H, W], which is the
    image of an all-ones colour. Differentiable in the colours.
    """
    through = torch.ones_like(distance[0])
    opacity = torch.zeros_like(through)
    image = colors.new_zeros(*through.shape, colors.shape[1])
    for index, square in zip(point, distance, strict=True):
        here = index >= 0
        if not here.any():
            break
        weight = torch.where(here, 1 - square / (radius * radius), 0.0)
        share = through * weight
        image = image + share[..., None].to(colors.dtype) * colors[index.clamp(min=0)]
        opacity = opacity + share
        through = through * (1 - weight)
    if background is not None:
        image = torch.where(point[0, ..., None] >= 0, image, background.to(image))
    return image, opacity
