"""A walk's latents straight to 3D Gaussians: what a model with a LaLRM leaves beside its video, and makes of it.

``latents.safetensors`` holds, clip by clip, ``latents`` [K, C, F', h, w], and the cameras, ``world_from_cam`` [K, F,
4, 4] and ``intrinsics`` [K, F, 3, 3]. No video is decoded on the way from there to the scene.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.gaussians import Gaussians
from fvgen.geometry.plucker import packed
from fvgen.models.lalrm import LaLRM
from fvgen.splats.ply import write_splat
from fvgen.splats.raymap import reconstructed
from fvgen.splats.reconstruct import MADE_BY, judge_out
from fvgen.splats.viewer import write_viewer
from fvgen.system.doors import load_tensors
from fvgen.system.files import write_json, write_tensors

LATENTS = "latents.safetensors"


class Latent(NamedTuple):
    """Scaled ``latents`` [1, C, F', h, w] of a clip, and the cameras of its F frames."""

    latents: Tensor
    cameras: Cameras


def keep(folder: Path, clips: Sequence[Latent]) -> None:
    """Write them to ``folder``."""
    poses, matrices = (
        torch.stack([getattr(clip.cameras, name).double() for clip in clips])
        for name in ("world_from_cam", "intrinsics")
    )
    tensors = {"latents": torch.cat([clip.latents.cpu() for clip in clips])}
    write_tensors(folder / LATENTS, tensors | {"world_from_cam": poses, "intrinsics": matrices})


def kept(folder: Path, height: int, width: int) -> list[Latent]:
    """What was kept. Raises UserError for a damaged file."""
    tensors = load_tensors(folder / LATENTS)
    try:
        rows = zip(*(tensors[name] for name in ("latents", "world_from_cam", "intrinsics")), strict=True)
        return [Latent(latents[None], Cameras(poses, matrices, height, width)) for latents, poses, matrices in rows]
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"{folder / LATENTS} is damaged; generate the walk again") from error


def fresh(clips: Sequence[Latent]) -> list[Tensor]:
    """[F] bool for each clip: its frames that no clip before it has. Where clips overlap, the first frames of one are
    the last of all before it; a path that comes back to a place is no overlap."""
    walk, found = packed(clips[0].cameras)[:0], []
    for clip in clips:
        rows, count = packed(clip.cameras), len(clip.cameras)
        shared = next((n for n in range(count, 0, -1) if torch.equal(walk[-n:], rows[:n])), 0)
        found.append(torch.arange(count) >= shared)
        walk = torch.cat([walk, rows[shared:]])
    return found


def walked(clips: Sequence[Latent]) -> Cameras:
    """The cameras of all clips in order, those once that clips share."""
    parts = [clip.cameras[new] for clip, new in zip(clips, fresh(clips), strict=True)]
    poses, matrices = (torch.cat([getattr(part, name) for part in parts]) for name in ("world_from_cam", "intrinsics"))
    return replace(clips[0].cameras, world_from_cam=poses, intrinsics=matrices)


def write_scene(
    folder: Path, lalrm: LaLRM, height: int, width: int, told: Callable[[str], None] = lambda line: None
) -> Path:
    """scene.ply, scene.html and scene.json in ``folder`` from the latents kept there; frames are ``height`` x
    ``width``. Clips of a long walk each give Gaussians of the frames that no clip before them has."""
    judge_out(folder, folder)
    clips = kept(folder, height, width)
    parts = [reconstructed(lalrm, *clip, new) for clip, new in zip(clips, fresh(clips), strict=True)]
    made = Gaussians(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Gaussians)))
    told(f"{len(made)} Gaussians from latents, {len(clips)} clips in one pass each")
    cameras = walked(clips).to(dtype=torch.float32)
    facts = {"made_by": MADE_BY, "from": LATENTS, "gaussians": len(made), "height": height, "width": width}
    views = [
        {"world_from_cam": pose, "intrinsics": lens}
        for pose, lens in zip(cameras.world_from_cam.tolist(), cameras.intrinsics.tolist(), strict=True)
    ]
    write_json(folder / "scene.json", facts | {"axes": "OpenCV: x right, y down, z forward", "views": views})
    write_splat(folder / "scene.ply", made)
    write_viewer(folder / "scene.html", made, cameras)
    return folder
