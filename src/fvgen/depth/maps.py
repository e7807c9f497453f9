"""Where points come from: depth of chosen views of a scene, from whatever there is, one row of `DEPTHS` for each way.

A backend that a later year brings is a module of `fvgen.depth` with two functions, and a row here. Photographs
without poses get them first, in `fvgen.posing.reconstruct`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.depth import depth_pro, dust3r, dust3r_model, flat, measured, sparse, stereo
from fvgen.depth.stereo import STEREO_SIDE
from fvgen.errors import UserError, did_you_mean
from fvgen.geometry.stereo import TooFewFeatures
from fvgen.scenes.scene import Scene

__all__ = ["DEPTHS", "STEREO_SIDE", "Backend", "PointMaps", "point_maps"]


class Backend(NamedTuple):
    """``lacks`` says in a few words why a backend cannot run on a scene, or None; ``run`` gives depth [K, H, W].
    ``asked_for``: "auto" never takes it."""

    lacks: Callable[[Scene], str | None]
    run: Callable[[Scene, Sequence[int], int, int], Tensor]
    asked_for: bool = False


class PointMaps(NamedTuple):
    """depth: [K, H, W], camera z in scene units, 0 is unknown; ``backend``: where it comes from."""

    depth: Tensor
    backend: str


def point_maps(scene: Scene, views: Sequence[int], height: int, width: int, backend: str = "auto") -> PointMaps:
    """Depth of the views for images of height x width, as `fit_image` cuts them out.

    Pixels that a view's mask hides have none. "auto" takes the first of `DEPTHS` that can run, and the next
    where photographs turn out to share too little. Raises UserError where none or not the given one can.
    """
    maps = _unmasked(scene, views, height, width, backend)
    return maps._replace(depth=masked(scene, views, maps.depth))


def masked(scene: Scene, views: Sequence[int], depth: Tensor) -> Tensor:
    """Depth [K, H, W] of the views, 0 where their masks hide the scene."""
    shown = scene.shown(views, *depth.shape[1:])
    return depth if shown is None else torch.where(shown, depth, 0.0)


def _unmasked(scene: Scene, views: Sequence[int], height: int, width: int, backend: str) -> PointMaps:
    if backend == "auto":
        return _best(scene, views, height, width)
    judge_source(backend)
    if reason := DEPTHS[backend].lacks(scene):
        raise UserError(f"scene {scene.name} cannot use the points of {backend!r} ({reason}); choose another source")
    return PointMaps(DEPTHS[backend].run(scene, views, height, width), backend)


def _best(scene: Scene, views: Sequence[int], height: int, width: int) -> PointMaps:
    reasons = {}
    for name, row in DEPTHS.items():
        if row.asked_for:
            continue
        reason = row.lacks(scene)
        if reason is None:
            try:
                return PointMaps(row.run(scene, views, height, width), name)
            except TooFewFeatures as error:
                reason = str(error).split(";")[0]
        reasons[name] = reason
    said = ", ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UserError(f"no depth can be had for scene {scene.name} ({said}); mend one of these")


DEPTHS: dict[str, Backend] = {  # best first; DUSt3R and Depth Pro count only where their weights were brought
    "depth": Backend(measured.lacks, measured.run),
    "dust3r": Backend(dust3r.lacks, dust3r.run),
    "stereo": Backend(stereo.lacks, stereo.run),
    "depth_pro": Backend(depth_pro.lacks, depth_pro.run),
    "colmap": Backend(sparse.lacks, sparse.run),
    "flat": Backend(flat.lacks, flat.run, asked_for=True),
}


def judge_source(name: str) -> None:
    """Raises UserError for what is neither "auto" nor a source of points."""
    if name not in DEPTHS and name != "auto":
        raise UserError(f"unknown source of points {name!r}{did_you_mean(name, [*DEPTHS, 'auto'])}")


def not_here(name: str) -> str | None:
    """Why a source of points can run on no scene at all on this machine, or None: told before anything is made."""
    if name == "depth_pro":
        return depth_pro.lacks(None)
    return dust3r_model.missing() if name == "dust3r" else None
