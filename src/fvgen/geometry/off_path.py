"""Views near a path but not on it: where a reconstruction has to be right that was made from the path's own frames."""

from __future__ import annotations

from dataclasses import replace

import torch

from fvgen.geometry.cameras import Cameras, look_at

AHEAD = 2.0  # extents of the path from a camera to what it looks at, where the scene is not known


def off_path(
    cameras: Cameras, count: int, generator: torch.Generator, shift: float = 0.25, beyond: float = 0.2
) -> Cameras:
    """``count`` views: somewhere along the path, or before or behind its ends by up to ``beyond`` of its length, then
    aside and up or down by ``shift`` of its extent (the distance between the two frames furthest apart), in a random
    direction; looking at what the nearest frame looks at.

    A path that stays in one place has no extent, and its views are its own. Same lens, size and type.
    """
    centers = cameras.centers.double()
    extent = torch.cdist(centers, centers).max()
    last = len(cameras) - 1
    along = (torch.rand(count, generator=generator, dtype=torch.float64) * (1 + 2 * beyond) - beyond) * last
    begin = along.floor().clamp(0, max(0, last - 1)).long()  # of the stretch that is followed, beyond the ends too
    end = (begin + 1).clamp(max=last)
    place = torch.lerp(centers[begin], centers[end], (along - begin)[:, None])
    near = along.round().clamp(0, last).long()
    if extent == 0:
        return cameras[near]
    pose = cameras.world_from_cam.double()[near]
    right, down, ahead = pose[:, :3, :3].unbind(dim=-1)
    turn = 2 * torch.pi * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    place = place + shift * extent * (turn.cos() * right + turn.sin() * down)
    target = centers[near] + AHEAD * extent * ahead
    seen = torch.stack([look_at(*each)[0] for each in zip(place[:, None], target[:, None], -down, strict=True)])
    return replace(cameras, world_from_cam=seen.to(cameras.world_from_cam), intrinsics=cameras.intrinsics[near])
