"""Depth of chosen views of a scene, from whatever there is: one interface, one row of `BACKENDS` for each way.

A backend that a later year brings is a function from (scene, views, height, width) to depth, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.data.photos import fit_depth, fit_image
from fvgen.data.posed import Scene
from fvgen.errors import UserError, did_you_mean
from fvgen.geometry.stereo import stereo_depth

STEREO_SIDE = 256  # pixels on the long side that stereo works at; finer is slower and hardly denser


class Backend(NamedTuple):
    """``lacks`` says in a few words why a backend cannot run on a scene, or None; ``run`` gives depth [K, H, W]."""

    lacks: Callable[[Scene], str | None]
    run: Callable[[Scene, Sequence[int], int, int], Tensor]


class PointMaps(NamedTuple):
    """depth: [K, H, W], camera z in scene units, 0 is unknown; ``backend``: where it comes from."""

    depth: Tensor
    backend: str


def point_maps(scene: Scene, views: Sequence[int], height: int, width: int, backend: str = "auto") -> PointMaps:
    """Depth of the views for images of height x width, as `photos.fit_image` cuts them out.

    "auto" takes the first of `BACKENDS` that can run. Raises UserError where none or not the given one can.
    """
    if backend == "auto":
        reasons = {name: row.lacks(scene) for name, row in BACKENDS.items()}
        backend = next((name for name, reason in reasons.items() if reason is None), "")
        if not backend:
            said = ", ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise UserError(f"no depth can be had for scene {scene.name} ({said}); mend one of these")
    if backend not in BACKENDS:
        raise UserError(f"unknown source of points {backend!r}{did_you_mean(backend, [*BACKENDS, 'auto'])}")
    if reason := BACKENDS[backend].lacks(scene):
        raise UserError(f"scene {scene.name} cannot use the points of {backend!r} ({reason}); choose another source")
    return PointMaps(BACKENDS[backend].run(scene, views, height, width), backend)


def _maps_of_scene(scene: Scene, views: Sequence[int], height: int, width: int) -> Tensor:
    return torch.stack([fit_depth(scene.depth(view), height, width) for view in views])


def _stereo(scene: Scene, views: Sequence[int], height: int, width: int) -> Tensor:
    scale = STEREO_SIDE / max(height, width)
    small = (max(1, round(height * scale)), max(1, round(width * scale)))
    images = torch.stack([fit_image(scene.image(view), *small) for view in range(len(scene))])
    names = [f"image {path}" for path in scene.image_paths]
    depth = stereo_depth(images, scene.cameras.fitted(*small), views, names)
    return torch.stack([fit_depth(one, height, width) for one in depth])


def _stereo_lacks(scene: Scene) -> str | None:
    if len(scene) < 3:
        return "stereo needs three posed photographs"
    return None if find_spec("cv2") else "OpenCV is not installed: `pip install fvgen[photos]`"


BACKENDS: dict[str, Backend] = {  # best first
    "depth": Backend(lambda scene: None if scene.depth_paths else "the scene has no depth maps", _maps_of_scene),
    "stereo": Backend(_stereo_lacks, _stereo),
}
