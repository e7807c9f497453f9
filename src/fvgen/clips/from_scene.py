"""Clips from a scene's photographs: the one place where views become a clip, for `fvgen prepare`, `fvgen inspect`, the
demo and the benchmarks.

What of a clip the networks may see comes from its known photographs alone, except for one thing: where surfaces are,
which structure-from-motion and stereo find out with all photographs. Colours never do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.clips.clip import Clip, Others, render_clip
from fvgen.clips.filters import measure, verdict
from fvgen.clips.views import Window, clip_windows, other_views, pose_distance, typical_depth
from fvgen.depth.maps import point_maps
from fvgen.errors import CannotWrite, UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.pointcloud import unproject
from fvgen.posing.sources import Source, open_source
from fvgen.scenes.images import fit_image
from fvgen.scenes.scene import Scene

# Why a clip is missing, beside the reasons of `fvgen.clips.filters`.
FEW_WINDOWS = "no further smooth path"
FEW_OTHERS = "too few other photographs nearby"

Timed = Callable[[str], AbstractContextManager]  # told the step that is about to begin


@dataclass(frozen=True)
class ClipSettings:
    """All that decides what the clips of a scene are.

    frames, height, width: of a clip. max_stride: see `clip_windows`. known_views: frames that the cloud is made from,
    evenly spaced. points: see `point_maps`. clips_per_scene: how many are tried. radius: see `point_radius`.
    half_pixel_shift: see `unproject`. limits: see `fvgen.clips.filters`. closed: see `fvgen.geometry.closing`.
    others: photographs beside the clip's own, see `other_views`; a clip that has fewer is lost.
    """

    frames: int
    height: int
    width: int
    max_stride: int
    known_views: int
    points: str
    clips_per_scene: int
    seed: int
    radius: float
    half_pixel_shift: bool
    limits: dict[str, float]
    closed: bool = False
    others: int = 0


class SceneClip(NamedTuple):
    """A clip that passed the filters, and where it comes from.

    scene: the source's own name. format: of `Opened`. files: of the F photographs, names. known: places of the known
    ones. backend: of `point_maps`, several joined by "+". points [N, 3] in the world, colors [N, 3] in [0, 1]: the
    cloud. figures: of `fvgen.clips.filters`. seed: for whatever random numbers the clip still needs.
    """

    clip: Clip
    scene: str
    format: str
    files: list[str]
    known: list[int]
    stride: int | None
    backend: str
    points: Tensor
    colors: Tensor
    figures: dict[str, float]
    seed: int


class Lost(NamedTuple):
    """A clip that there is not, and why; ``broken``: the input is at fault, else a filter or the number of views."""

    name: str
    reason: str
    broken: bool


def scene_clips(
    source: Source, numbers: Sequence[int], settings: ClipSettings, timed: Timed = lambda step: nullcontext()
) -> Iterator[SceneClip | Lost]:
    """For each of the numbers the scene's clip of it, or why there is none.

    Everything random comes from (seed, name of the source, number) alone. Raises UserError only where nothing can be
    written, the cache of posed scenes included.
    """
    try:
        with timed("read"):
            opened = open_source(source.path, settings.points)
        with timed("choose"):
            generator = torch.Generator().manual_seed(_seed(settings.seed, source.name, "views"))
            arguments = (opened.scene, settings.clips_per_scene, settings.frames, settings.max_stride, generator)
            windows = clip_windows(*arguments)
            distance = pose_distance(opened.scene.cameras, typical_depth(opened.scene)) if settings.others else None
    except CannotWrite:
        raise
    except UserError as error:
        yield from [Lost(source.name, str(error), broken=True)] * len(numbers)
        return
    known = _evenly(settings.known_views, settings.frames)
    wanted = [windows[number].views[frame] for number in numbers if number < len(windows) for frame in known]
    with timed("points"):
        maps = Depths(opened.scene, settings, wanted)
    for number in numbers:
        name = f"{source.name}-{number:02d}"
        if number >= len(windows):
            yield Lost(name, FEW_WINDOWS, broken=False)
            continue
        more: list[int] = []
        if distance is not None:
            generator = torch.Generator().manual_seed(_seed(settings.seed, source.name, number, "others"))
            more = other_views(distance, windows[number].views, settings.others, generator)
        if len(more) < settings.others:
            yield Lost(name, FEW_OTHERS, broken=False)
            continue
        try:
            made = _clip(opened.scene, name, windows[number], known, maps, settings, timed)
            if more:
                with timed("load"):
                    others = Others(
                        *photographs(opened.scene, more, settings.height, settings.width),
                        shown=opened.scene.shown(more, settings.height, settings.width),
                    )
                made = made._replace(clip=replace(made.clip, others=others))
        except UserError as error:
            yield Lost(name, str(error), broken=True)
            continue
        if reason := verdict(made.figures, settings.limits):
            yield Lost(name, reason, broken=False)
        else:
            yield made._replace(scene=source.name, format=opened.format, seed=_seed(settings.seed, source.name, number))


def photographs(scene: Scene, views: Sequence[int], height: int, width: int) -> tuple[Tensor, Cameras]:
    """The views' photographs [F, 3, height, width] in [0, 1], cut and resized, and cameras that are so, too."""
    truth = torch.stack([fit_image(scene.image(view), height, width) for view in views])
    return truth, scene.cameras[list(views)].fitted(height, width)


def _clip(
    scene: Scene,
    name: str,
    window: Window,
    known: list[int],
    maps: Depths,
    settings: ClipSettings,
    timed: Timed,
) -> SceneClip:
    """The clip of a window, its cloud from the depth of its known frames."""
    depth = torch.stack([maps[window.views[frame]] for frame in known])
    backend = "+".join(sorted({maps.backends[window.views[frame]] for frame in known}))
    with timed("load"):
        truth, cameras = photographs(scene, window.views, settings.height, settings.width)
        points, colors = unproject(depth, truth[known], cameras[known], settings.half_pixel_shift)
    with timed("render"):
        clip, seen = render_clip(name, truth, cameras, points, colors, known, settings.radius, settings.closed)
        clip = replace(clip, shown=scene.shown(window.views, settings.height, settings.width))
    with timed("filter"):
        figures = measure(clip, len(points), seen, window.motion)
    files = [scene.image_paths[view].name for view in window.views]
    return SceneClip(clip, "", "", files, known, window.stride, backend, points, colors, figures, 0)


class Depths:
    """Depth by view, all from one call where that works: backends read and match all of a scene's photographs.

    Where it fails each view is tried alone, when it is asked for, and raises its UserError then.
    """

    def __init__(self, scene: Scene, settings: ClipSettings, views: Sequence[int]) -> None:
        self._ask = lambda views: point_maps(scene, views, settings.height, settings.width, settings.points)
        self._maps: dict[int, Tensor] = {}
        self.backends: dict[int, str] = {}  # of each view
        if unique := sorted(set(views)):
            with suppress(UserError):  # told by the view that it is about
                self._keep(unique)

    def __getitem__(self, view: int) -> Tensor:
        if view not in self._maps:
            self._keep([view])
        return self._maps[view]

    def _keep(self, views: list[int]) -> None:
        depth, backend = self._ask(views)
        self._maps |= dict(zip(views, depth, strict=True))
        self.backends |= dict.fromkeys(views, backend)


def _evenly(count: int, frames: int) -> list[int]:
    """``count`` of the frames 0..frames-1, ends included."""
    return [0] if count == 1 else [round(k * (frames - 1) / (count - 1)) for k in range(count)]


def _seed(*words: object) -> int:
    digest = hashlib.sha256(f"fvgen prepare {' '.join(map(str, words))}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
