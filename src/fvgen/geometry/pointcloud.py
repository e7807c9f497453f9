"""Coloured point clouds: from depth maps, and back to images.

The renderer follows PyTorch3D's point rasteriser and alpha compositor: a point covers the pixels whose centres lie
within ``radius`` of it, the nearest ``points_per_pixel`` points are kept, and each is laid over those behind it with
opacity 1 - (distance / radius)^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras, pixel_rays, project


def unproject(depth: Tensor, images: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Depth maps [V, H, W] (camera z, scene units; 0 is unknown) with images [V, 3, H, W] to one cloud.

    Returns points [N, 3] in the world and colours [N, 3] in [0, 1].
    """
    points = cameras.centers[:, None, None] + depth[..., None] * pixel_rays(cameras)
    colors = images.permute(0, 2, 3, 1)
    known = torch.isfinite(depth) & (depth > 0)
    return points[known], colors[known]


def render_points(
    points: Tensor,
    colors: Tensor,
    cameras: Cameras,
    radius: float = 0.01,
    points_per_pixel: int = 10,
) -> tuple[Tensor, Tensor, Tensor]:
    """Splat points [N, 3] with colours [N, C] into every camera.

    ``radius`` is in normalised device units: the image's short side spans 2. Returns image [V, H, W, C] over black,
    visibility [V, H, W] (opacity in [0, 1]) and depth [V, H, W] of the nearest point (0 where there is none).
    Views are rendered one by one, so memory does not grow with their number. Differentiable in the colours.
    """
    views = [_render_view(points, colors, cameras[[v]], radius, points_per_pixel) for v in range(len(cameras))]
    image, visibility, depth = (torch.stack(parts) for parts in zip(*views, strict=True))
    return image, visibility, depth


def _render_view(
    points: Tensor, colors: Tensor, camera: Cameras, radius: float, points_per_pixel: int
) -> tuple[Tensor, Tensor, Tensor]:
    height, width = camera.height, camera.width
    pixels, depths = project(points, camera)
    pixel, depth = pixels[0], depths[0]
    radius_px = radius * min(height, width) / 2
    index, cell, distance = _covered(pixel, depth, radius_px, height, width)

    # Sort by (pixel, depth); a point's rank within its pixel is its place behind the first of that pixel.
    order = torch.argsort(depth[index], stable=True)
    order = order[torch.argsort(cell[order], stable=True)]
    index, cell, distance = index[order], cell[order], distance[order]
    start = torch.searchsorted(cell, torch.arange(height * width, device=cell.device))
    rank = torch.arange(cell.shape[0], device=cell.device) - start[cell]
    keep = rank < points_per_pixel
    index, cell, distance, rank = index[keep], cell[keep], distance[keep], rank[keep]

    alpha = torch.zeros(points_per_pixel, height * width, dtype=pixel.dtype, device=pixel.device)
    alpha[rank, cell] = 1 - distance**2 / radius_px**2
    transparency = torch.cumprod(torch.cat([torch.ones_like(alpha[:1]), 1 - alpha]), dim=0)
    weight = alpha * transparency[:-1]
    image = torch.zeros(height * width, colors.shape[1], dtype=colors.dtype, device=colors.device)
    image = image.index_add(0, cell, weight[rank, cell][:, None].to(colors.dtype) * colors[index])
    nearest = torch.zeros(height * width, dtype=depth.dtype, device=depth.device)
    first = rank == 0
    nearest[cell[first]] = depth[index[first]]
    shape = (height, width)
    return image.reshape(*shape, -1), (1 - transparency[-1]).reshape(shape), nearest.reshape(shape)


def _covered(pixel: Tensor, depth: Tensor, radius_px: float, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """All (point, pixel) pairs in reach: point index [M], flat pixel index [M], distance in pixels [M]."""
    reach = int(radius_px + 1)
    near = (depth > 0) & (pixel > -reach - 1).all(-1)
    near &= (pixel[:, 0] < width + reach + 1) & (pixel[:, 1] < height + reach + 1)
    candidates = near.nonzero()[:, 0]
    base = pixel[candidates].floor().long()
    steps = torch.arange(-reach, reach + 1, device=pixel.device)
    offset = torch.cartesian_prod(steps, steps)  # [(2 reach + 1)^2, 2]
    covered = base[:, None] + offset
    distance = (covered + 0.5 - pixel[candidates][:, None]).norm(dim=-1)
    x, y = covered.unbind(-1)
    keep = (distance < radius_px) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = candidates[:, None].expand_as(x)[keep]
    return index, (y * width + x)[keep], distance[keep]
