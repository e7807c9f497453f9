"""The points that COLMAP triangulated, as depth maps that are empty elsewhere: a last resort, and others' anchor."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from fvgen.depth.stereo import triangulated
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, project
from fvgen.scenes.scene import Scene
from fvgen.system.packages import install


def lacks(scene: Scene) -> str | None:
    return None if scene.points is not None and scene.observations is not None else "the scene has no COLMAP points"


def run(scene: Scene, views: Sequence[int], height: int, width: int) -> Tensor:
    """Where several points fall on a pixel the nearest counts; points that only other views found are left out."""
    cameras = scene.cameras.fitted(height, width)
    return torch.stack([_one(scene, cameras, view) for view in views])


def _one(scene: Scene, cameras: Cameras, view: int) -> Tensor:
    pixels, depth = found_points(scene, cameras, view)
    if not len(depth):
        raise UserError(f"image {scene.image_paths[view]} shows none of the scene's COLMAP points; leave it out")
    x, y = pixels.floor().long().unbind(-1)
    out = depth.new_full((cameras.height * cameras.width,), torch.inf)
    out.scatter_reduce_(0, y * cameras.width + x, depth, "amin")
    return torch.where(out.isfinite(), out, 0.0).reshape(cameras.height, cameras.width)


def found_points(scene: Scene, cameras: Cameras, view: int) -> tuple[Tensor, Tensor]:
    """Pixels [M, 2] and depths [M] of the scene's points that were found in a view and fall into the image."""
    pixels, depth = (part[0] for part in project(scene.points[scene.seen_by(view)], cameras[[view]]))
    inside = ((pixels >= 0) & (pixels < pixels.new_tensor([cameras.width, cameras.height]))).all(-1) & (depth > 0)
    return pixels[inside], depth[inside]


def anchors(scene: Scene, view: int) -> tuple[Tensor, Tensor]:
    """Pixels [M, 2] of a photograph with known depth [M]: COLMAP's points, else triangulated features (OpenCV)."""
    return found_points(scene, scene.cameras, view) if lacks(scene) is None else triangulated(scene, view)


def lacks_anchors(scene: Scene) -> str | None:
    """Why nothing can tell the scale of the poses, or None."""
    if lacks(scene) is None:
        return None
    if len(scene) < 2:
        return "one photograph without COLMAP points does not tell the scale"
    cure = install("photos")
    return None if find_spec("cv2") else f"neither COLMAP points nor OpenCV (`{cure}`) tell the scale"
