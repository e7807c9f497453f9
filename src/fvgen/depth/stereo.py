"""Dense depth from the posed photographs themselves: `fvgen.geometry.stereo`. No network, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras, project
from fvgen.geometry.stereo import stereo_depth, triangulated_features
from fvgen.scenes.images import fit_depth, fit_image
from fvgen.scenes.scene import Scene
from fvgen.system.packages import install

STEREO_SIDE = 256  # pixels on the long side that stereo works at; finer is slower and hardly denser
FEATURE_SIDE = 512  # the same for single features, which are cheap


def lacks(scene: Scene) -> str | None:
    if len(scene) < 2:
        return "stereo needs two posed photographs"
    return None if find_spec("cv2") else f"OpenCV is not installed: `{install('photos')}`"


def run(scene: Scene, views: Sequence[int], height: int, width: int) -> Tensor:
    names = [f"image {path}" for path in scene.image_paths]
    depth = stereo_depth(*_small(scene, height, width, STEREO_SIDE), views, names, _found(scene))
    return torch.stack([fit_depth(one, height, width) for one in depth])


def _found(scene: Scene) -> dict[int, Tensor]:
    """Depths of the scene's own points by view."""
    if scene.points is None or scene.observations is None:
        return {}
    depth = project(scene.points, scene.cameras)[1]
    return {view: depth[view, scene.seen_by(view)] for view in range(len(scene))}


def triangulated(scene: Scene, view: int) -> tuple[Tensor, Tensor]:
    """Pixels [M, 2] of the whole photograph and depths [M] of features that its neighbours show as well."""
    images, cameras = _small(scene, scene.cameras.height, scene.cameras.width, FEATURE_SIDE)
    pixels, depth = triangulated_features(images.mean(1), cameras, view)
    larger = (scene.cameras.width / cameras.width, scene.cameras.height / cameras.height)
    return pixels * pixels.new_tensor(larger), depth


def _small(scene: Scene, height: int, width: int, side: int) -> tuple[Tensor, Cameras]:
    scale = side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    images = torch.stack([fit_image(scene.image(view), *size) for view in range(len(scene))])
    return images, scene.cameras.fitted(*size)
