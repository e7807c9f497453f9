"""Clips from posed photographs, ready to be rendered, with a point cloud that tells nothing of the frames between.

What leaves here comes from the known photographs alone, except for one thing: where surfaces are, which
structure-from-motion and stereo find out with all photographs. Colours never do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.clips.views import choose_views, fit_image
from fvgen.depth.maps import scene_cloud
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.pointcloud import unproject
from fvgen.scenes.scene import Scene


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
