"""Coloured point clouds: from depth maps, and back to images as PyTorch3D's point renderer draws them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fvgen.errors import UserError, did_you_mean
from fvgen.geometry.cameras import Cameras, pixel_rays
from fvgen.geometry.conventions import world_to_ndc
from fvgen.geometry.rasterize import check_settings, composite, rasterize_view

VIEWCRAFTER_RADIUS = 0.01  # normalised device units, at frames of 288 rows or more
SMALL_RADIUS_PIXELS = 1.44  # in smaller frames: what 0.01 is at 288 rows, and the built-in scenes have

# A view [N, 3] in NDC, image size, radius, points per pixel -> point, depth, squared distance [K, H, W]
Rasterizer = Callable[[Tensor, tuple[int, int], float, int], tuple[Tensor, Tensor, Tensor]]


def point_radius(height: int, width: int) -> float:
    """Normalised device units (the short side spans 2): ViewCrafter's, but never less than 1.44 pixels."""
    return max(VIEWCRAFTER_RADIUS, 2 * SMALL_RADIUS_PIXELS / min(height, width))


def unproject(depth: Tensor, images: Tensor, cameras: Cameras, half_pixel_shift: bool = False) -> tuple[Tensor, Tensor]:
    """Depth maps [V, H, W] (camera z, scene units; 0 is unknown) with images [V, 3, H, W] to one cloud.

    Each pixel goes along the ray through its centre; with ``half_pixel_shift`` through its top-left corner. That is
    ViewCrafter's way (DUSt3R's point maps count pixels by whole numbers, and PyTorch3D then draws the point of pixel i
    at u = i): its renders are the image moved by half a pixel to the left and up, and blurred. Its teachers were
    trained on such renders, so switch it on for them.
    Returns points [N, 3] in the world and colours [N, 3] in [0, 1].
    """
    offset = (0.0, 0.0) if half_pixel_shift else (0.5, 0.5)
    points = cameras.centers[:, None, None] + depth[..., None] * pixel_rays(cameras, offset)
    colors = images.permute(0, 2, 3, 1)
    known = torch.isfinite(depth) & (depth > 0)
    return points[known], colors[known]


def render_points(
    points: Tensor,
    colors: Tensor,
    cameras: Cameras,
    radius: float = 0.01,
    points_per_pixel: int = 10,
    background: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Splat points [N, 3] with colours [N, C] into every camera.

    ``radius`` is in normalised device units: the image's short side spans 2. ``background`` [C] shows where there is
    no point at all; None is black. ``backend`` is a key of `RENDERERS` or "auto": PyTorch3D for a cloud on a GPU if it
    is installed and compiled with CUDA, else torch; on a CPU PyTorch3D is hundreds of times slower and gives the same
    bits in float32.
    Returns image [V, H, W, C], visibility [V, H, W] (opacity in [0, 1] up to rounding) and depth [V, H, W] of the
    nearest point (0 where there is none). Views are rendered one by one, so working memory does not grow with their
    number. Differentiable in the colours. Raises UserError for an unknown backend and one that is not installed.
    """
    size = (cameras.height, cameras.width)
    check_settings(size, radius, points_per_pixel)
    rasterize = _backend(backend, points.device)
    shape = (len(cameras), *size)
    images, visibility = [], torch.zeros(shape, dtype=points.dtype, device=points.device)
    depth = torch.zeros_like(visibility)
    for view in range(len(cameras)):
        with torch.no_grad():
            ndc = world_to_ndc(points, cameras[[view]])[0]
            point, layers, distance = rasterize(ndc, size, radius, points_per_pixel)
        image, visibility[view] = composite(point, distance, colors, radius, background)
        images.append(image)
        depth[view] = layers[0].clamp(min=0)
    return torch.stack(images), visibility, depth


def _backend(name: str, device: torch.device) -> Rasterizer:
    if name == "auto":
        name = "pytorch3d" if device.type == "cuda" and pytorch3d_has_cuda() else "torch"
    if name not in RENDERERS:
        raise UserError(f"unknown renderer {name!r}{did_you_mean(name, [*RENDERERS, 'auto'])}")
    return RENDERERS[name]


def pytorch3d_has_cuda() -> bool:
    """Its setup leaves the CUDA kernels out, without a word, on a machine that has no nvcc or shows no GPU."""
    try:
        from pytorch3d import _C
    except ImportError:
        return False
    return hasattr(_C, "knn_check_version")  # compiled with CUDA only, in every version since 0.2


def _pytorch3d(
    points: Tensor, image_size: tuple[int, int], radius: float, points_per_pixel: int
) -> tuple[Tensor, Tensor, Tensor]:
    try:
        from pytorch3d.renderer.points.rasterize_points import rasterize_points
        from pytorch3d.structures import Pointclouds
    except ImportError as error:
        raise UserError(
            f"the renderer 'pytorch3d' cannot be imported ({error}); install PyTorch3D or choose the renderer 'torch', "
            "which gives the same pixels"
        ) from error
    if points.is_cuda and not pytorch3d_has_cuda():
        raise UserError(
            "PyTorch3D was compiled without CUDA here and cannot draw on a GPU; choose the renderer 'torch' or 'auto'"
        )
    if not len(points):  # PyTorch3D fails on a batch of empty clouds
        return rasterize_view(points, image_size, radius, points_per_pixel)
    # bin_size=0, as ViewCrafter: the faster one may drop points where many fall together.
    # It takes an int for a wrong type of radius.
    layers = rasterize_points(Pointclouds([points.float()]), image_size, float(radius), points_per_pixel, bin_size=0)
    point, depth, distance = (layer[0].movedim(-1, 0) for layer in layers)
    return point, depth.to(points.dtype), distance.to(points.dtype)


RENDERERS: dict[str, Rasterizer] = {"torch": rasterize_view, "pytorch3d": _pytorch3d}
