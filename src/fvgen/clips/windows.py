"""Which views make a training clip: windows of the order of capture, with a random stride, as FVGen (section 5.1) does.

Photographs that were not taken along a path have no such order; for them views are chosen by pose.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.clips.views import choose_views, path_score, pose_distance, typical_depth
from fvgen.scenes.scene import Scene

# A window with a higher `path_score` is no path that one would film: it jumps, or goes on long after its start is out
# of sight.
HIGHEST_SCORE = 4.0


class Window(NamedTuple):
    """views: [F] in the clip's order; stride: views from one to the next in the order of capture, None: by pose;
    motion: length of the path in radians, turn and parallax (`pose_distance`)."""

    views: list[int]
    stride: int | None
    motion: float


def clip_windows(scene: Scene, count: int, frames: int, max_stride: int, generator: torch.Generator) -> list[Window]:
    """Up to ``count`` different clips of a scene.

    Each draws a stride of 1..max_stride evenly among those for which smooth windows are left, then one of these, then
    its direction. Where the order of capture gives no smooth window at all, `choose_views` chooses by pose. Raises
    UserError where that cannot either.
    """
    distance = pose_distance(scene.cameras, typical_depth(scene))
    order = torch.tensor(capture_order(scene))
    windows = {stride: _smooth(distance, order, frames, stride) for stride in range(1, max_stride + 1)}
    chosen: list[tuple[Tensor, int | None]] = []
    while len(chosen) < count and (left := [stride for stride in windows if len(windows[stride])]):
        stride = left[_draw(len(left), generator)]
        place = _draw(len(windows[stride]), generator)
        views = windows[stride][place]
        windows[stride] = torch.cat([windows[stride][:place], windows[stride][place + 1 :]])
        chosen.append((views.flip(0) if _draw(2, generator) else views, stride))
    if not chosen:
        chosen = [(torch.tensor(views), None) for views in choose_views(scene, frames, count, generator, at_most=True)]
    return [Window(v.tolist(), stride, distance[v[:-1], v[1:]].sum().item()) for v, stride in chosen]


def capture_order(scene: Scene) -> list[int]:
    """The views by file name, numbers in it by value: how cameras and video tools number what they write."""

    def key(view: int) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", scene.image_paths[view].as_posix())
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    return sorted(range(len(scene)), key=key)


def _smooth(distance: Tensor, order: Tensor, frames: int, stride: int) -> Tensor:
    """[P, F] views: the windows of a stride that are smooth paths."""
    reach = (frames - 1) * stride
    starts = torch.arange(max(0, len(order) - reach))
    paths = order[starts[:, None] + stride * torch.arange(frames)]
    return paths[path_score(distance, paths) <= HIGHEST_SCORE]


def _draw(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
