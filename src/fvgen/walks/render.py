"""Points from the photographs, and what they show along a path: the renders that a model is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fvgen.depth.maps import masked, point_maps
from fvgen.depth.sparse import found_points, lacks
from fvgen.errors import UserError
from fvgen.geometry import closing
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.pointcloud import point_radius, render_points, unproject
from fvgen.scenes.images import fit_image
from fvgen.scenes.scene import Scene
from fvgen.walks.paths import Walk

DENSE = 0.5  # share of pixels with depth below which the rest is filled in
LITTLE = 0.3  # coverage below which a frame is warned of


@dataclass(frozen=True)
class Cloud:
    """Points of the ``views`` at the frames' size.

    photographs: [K, 3, H, W] in [0, 1]; cameras: theirs; depth: [K, H, W]; backend: of `point_maps`; filled: share of
    the pixels whose depth was interpolated.
    """

    views: list[int]
    photographs: Tensor
    cameras: Cameras
    depth: Tensor
    backend: str
    filled: float

    @property
    def typical(self) -> float:
        """Median depth of the first view."""
        known = self.depth[0][self.depth[0] > 0]
        return (known if len(known) else self.depth[self.depth > 0]).median().item()


@dataclass(frozen=True)
class Rendered:
    """frames: [F, 3, H, W] in [0, 1], photographs where ``known`` [F]; coverage: [F], share of pixels with a point;
    depth: [F, H, W] of the nearest point, 0 where there is none."""

    frames: Tensor
    known: Tensor
    coverage: Tensor
    depth: Tensor
    cameras: Cameras


def make_cloud(scene: Scene, views: list[int], height: int, width: int, points: str = "auto") -> Cloud:
    """Depth of the views, gaps filled in where it is sparse. Raises UserError where there is none."""
    maps = point_maps(scene, views, height, width, points)
    cameras = scene.cameras.fitted(height, width)
    depth = maps.depth.clone()
    for place, view in enumerate(views):
        if (depth[place] > 0).float().mean() < DENSE:
            depth[place] = _filled(depth[place], scene, cameras, view)
    depth = masked(scene, views, depth)
    photographs = torch.stack([fit_image(scene.image(view), height, width) for view in views])
    filled = ((depth > 0) & (maps.depth <= 0)).float().mean().item()
    return Cloud(views, photographs, cameras[views], depth, maps.backend, round(filled, 4))


def render_walk(
    cloud: Cloud,
    walk: Walk,
    half_pixel_shift: bool = False,
    extra: tuple[Tensor, Tensor] | None = None,
    close: bool = False,
) -> Rendered:
    """The cloud (and ``extra`` points [N, 3] with colours) along the path; photographs where it meets them. ``close``:
    without holes."""
    points, colors = unproject(cloud.depth, cloud.photographs, cloud.cameras, half_pixel_shift)
    if extra is not None:
        points, colors = torch.cat([points, extra[0]]), torch.cat([colors, extra[1]])
    cameras = walk.cameras.to(dtype=torch.float32)
    radius = point_radius(cameras.height, cameras.width) * (closing.RADIUS if close else 1.0)
    images, opacity, depth = render_points(points, colors, cameras, radius)
    frames = images.permute(0, 3, 1, 2).clamp(0, 1)
    if close:
        frames = closing.closed(frames, opacity)
    known = torch.zeros(len(frames), dtype=torch.bool)
    for frame, view in walk.known.items():
        if view in cloud.views:
            frames[frame], known[frame] = cloud.photographs[cloud.views.index(view)], True
    coverage = (opacity > 0).float().mean((1, 2))
    return Rendered(frames, known, torch.where(known, 1.0, coverage), depth, cameras)


def judge_start(rendered: Rendered) -> str | None:
    """Of a walk by a model that is guided by cameras, which may look away from the points but goes on from frame 0: a
    warning where that is no photograph, or None. Raises UserError where it shows nothing."""
    seen = rendered.coverage[0].item()
    if seen == 0:
        raise UserError("frame 0 of the path sees no point, and the model goes on from it; begin at a photograph")
    if rendered.known[0]:
        return None
    return f"frame 0 is no photograph but a render, {seen:.0%} of it filled, and the model goes on from it"


def judge_coverage(rendered: Rendered) -> str | None:
    """A warning where frames see little, or None. Raises UserError where some see nothing."""
    nothing = (rendered.coverage == 0).nonzero().flatten().tolist()
    if nothing:
        raise UserError(f"the path leaves the points: frames {ranges(nothing)} see nothing; choose another path")
    little = (rendered.coverage < LITTLE).nonzero().flatten().tolist()
    if not little:
        return None
    least = rendered.coverage.min().item()
    return f"frames {ranges(little)} see less than {LITTLE:.0%} of their image filled (least {least:.0%}): inventions"


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] as "1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _filled(depth: Tensor, scene: Scene, cameras: Cameras, view: int) -> Tensor:
    """[H, W] depth everywhere: inverse depth interpolated over Delaunay triangles of the known pixels and COLMAP's
    points, beyond their hull that of the nearest one. With fewer than four there is nothing to interpolate."""
    from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator

    y, x = (depth > 0).nonzero(as_tuple=True)
    places, inverse = torch.stack([x + 0.5, y + 0.5], dim=1), 1 / depth[y, x]
    if lacks(scene) is None:
        pixels, found = found_points(scene, cameras, view)
        places, inverse = torch.cat([places, pixels]), torch.cat([inverse, 1 / found])
    if len(places) < 4:
        return depth
    height, width = depth.shape
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    try:
        inside = LinearNDInterpolator(places.numpy(), inverse.numpy())(grid)
    except Exception:  # qhull's own error for points on one line
        inside = np.full((height, width), np.nan)
    outside = NearestNDInterpolator(places.numpy(), inverse.numpy())(grid)
    filled = torch.from_numpy(np.where(np.isnan(inside), outside, inside)).float()
    return torch.where(depth > 0, depth, 1 / filled)
