"""Latents of prepared clips: encoded once, kept beside the clips, read as batches.

The cache is keyed by the weights of whatever made it (VAE, image encoder, projector, prompts), so another teacher on
the same clips never reads stale latents. Camera paths are no part of it: they come from the clips, so that a base and
the models that are guided on it share what was encoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fvgen.clips.clip import Clip, shown_of, to_bytes
from fvgen.clips.folder import ClipFolder
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.plucker import judge_cameras, normalised, packed, seen_from
from fvgen.models.condition import CAMERA_PATH, Condition, joined
from fvgen.pipelines.cameras import clip_path
from fvgen.system.doors import Unreadable, load_tensors, not_finite
from fvgen.system.files import write_tensors

if TYPE_CHECKING:
    from fvgen.pipelines.base import NovelViewPipeline


@dataclass(frozen=True)
class LatentBatch:
    """``latents`` [B, C, F, h, w]: the scaled latents of the true frames; ``condition``: what the networks may see;
    ``views``: pictures of the scenes, for a method that `needs` them, see `views_of`."""

    latents: Tensor
    condition: Condition
    views: Condition | None = None

    def to(self, device: str | torch.device) -> LatentBatch:
        """The same batch on another device."""
        views = None if self.views is None else self.views.to(device, non_blocking=True)
        latents = self.latents.to(device, non_blocking=True)
        return LatentBatch(latents, self.condition.to(device, non_blocking=True), views)


class LatentSet:
    """All clips of a folder in memory, encoded: ``tensors`` holds "latents" [N, C, F, h, w] and the tensors of their
    conditions by name, [N, ...], or [1, ...] for what holds for all; ``views`` those of `views_of`, where wanted."""

    def __init__(self, tensors: dict[str, Tensor], names: list[str], views: Condition | None = None) -> None:
        self.tensors, self.names, self.views = tensors, names, views

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Tensor | list[int], device: str | torch.device = "cpu") -> LatentBatch:
        """The clips at ``indices`` as one batch."""
        latents = self.tensors["latents"][indices].to(device, non_blocking=True)
        condition = Condition(**{key: tensor for key, tensor in self.tensors.items() if key != "latents"})
        views = None if self.views is None else self.views.rows(indices).to(device, non_blocking=True)
        return LatentBatch(latents, condition.rows(indices).to(device, non_blocking=True), views)

    def random_batch(
        self, size: int, generator: torch.Generator, device: str | torch.device = "cpu", rows: slice = slice(None)
    ) -> LatentBatch:
        """``size`` clips drawn with replacement, and of these the ones at ``rows``."""
        return self.batch(torch.randint(len(self), (size,), generator=generator)[rows], device)


def load_latents(clips: ClipFolder, pipeline: NovelViewPipeline, seed: int = 0, views: bool = False) -> LatentSet:
    """The latents of ``clips`` under ``pipeline``'s encoders, from the cache or encoded now and cached; with the clips'
    ``views`` where they are wanted.

    Posterior samples are drawn once, from ``seed``, as ViewCrafter samples its VAE. Raises UserError for a damaged
    cache file.
    """
    wanted = enumerate(clips.names) if pipeline.wants_cameras else ()
    paths = [path_of(name, clips.cameras(index)) for index, name in wanted]
    file = clips.path / f"encoded-{pipeline.encoder_fingerprint()}-{seed}.safetensors"
    if not file.exists():
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            encoded = [_encode(clips, index, pipeline, generator) for index in range(len(clips))]
        tensors = {key: _stacked([row[key] for row in encoded]) for key in encoded[0]}
        write_tensors(file, tensors)
    try:
        tensors = load_tensors(file)
    except Unreadable as error:
        raise UserError(f"the latent cache {file} is damaged ({error.reason}); delete it and run again") from error
    latents = tensors.get("latents")
    fits = latents is not None and latents.ndim == 5 and len(latents) == len(clips)
    if not fits or any(tensor.ndim < 1 or len(tensor) not in (1, len(clips)) for tensor in tensors.values()):
        raise UserError(f"the latent cache {file} does not fit its clips; delete it and run again")
    if (name := not_finite(tensors.items())) is not None:
        raise UserError(f"the latent cache {file}: {name[:100]} holds NaN or an infinity; delete it and run again")
    if paths:
        tensors[CAMERA_PATH] = torch.stack(paths)
    return LatentSet(tensors, clips.names, all_views(clips) if views else None)


def views_of(clip: Clip) -> Condition:
    """What a reconstruction of the clip is to show, [1, ...]: ``images`` [V, 3, H, W] uint8 and ``path`` [V, 21], its
    frames first and then its other views, as its first camera sees them in units of the path (`packed`, `normalised`);
    ``shown`` [V, H, W] bool, see `Clip`; and ``depth`` [V, H, W] in those units, where it is known.

    Raises UserError for a clip without cameras, with some that are none, or whose path does not move.
    """
    if clip.cameras is None:
        raise UserError(f"clip {clip.name} has no cameras, which its views need; prepare it again with this fvgen")
    path, scale = normalised(clip.cameras)
    images, shown, others = [to_bytes(clip.truth)], [shown_of(clip)], clip.others
    rows, depth = [packed(path).float()], None
    if others is not None:
        judge_cameras(others.cameras)
        images.append(to_bytes(others.images))
        shown.append(shown_of(others))
        rows.append(packed(seen_from(clip.cameras, others.cameras, scale)).float())
        depth = None if others.depth is None else scale * others.depth[None]
    joined = {"images": torch.cat(images), "path": torch.cat(rows), "shown": torch.cat(shown)}
    return Condition(**{name: x[None] for name, x in joined.items()}, depth=depth)


def all_views(clips: ClipFolder) -> Condition:
    """`views_of` all clips, [N, ...]."""
    return joined([views_of(clips[index]) for index in range(len(clips))])


def condition_of(clip: Clip, pipeline: NovelViewPipeline, generator: torch.Generator) -> Condition:
    """What ``pipeline``'s network sees of a clip, [1, ...]: of its render, and of its cameras where it wants them.

    Raises UserError for a clip without the cameras that it wants.
    """
    if not pipeline.wants_cameras:
        return pipeline.condition(clip.render[None], generator)
    path_of(clip.name, clip.cameras)  # judged before the render is encoded
    return pipeline.condition(clip.render[None], generator, cameras=clip.cameras)


def encoded_condition(clip: Clip, pipeline: NovelViewPipeline, generator: torch.Generator) -> Condition:
    """Of that, what encoders make, and so is worth keeping: all but the path, which the clip's cameras say."""
    return condition_of(clip, pipeline, generator).without(CAMERA_PATH)


def path_of(clip: str, cameras: Cameras | None) -> Tensor:
    """[F, 21], see `clip_path`, of the clip of that name. Raises UserError for one without cameras."""
    if cameras is None:
        raise UserError(f"clip {clip} has no cameras, which this model is guided by; prepare it again with this fvgen")
    return clip_path(cameras)


def _stacked(rows: list[Tensor]) -> Tensor:
    """[N, ...] of rows [1, ...], or one row where all are the same."""
    same = all(torch.equal(row, rows[0]) for row in rows[1:])
    return rows[0].contiguous() if same else torch.cat(rows).contiguous()


def _encode(clips: ClipFolder, index: int, pipeline: NovelViewPipeline, generator: torch.Generator) -> dict:
    clip = clips[index]
    latents = pipeline.encode_frames(clip.truth[None], generator)
    return {"latents": latents, **encoded_condition(clip, pipeline, generator)}
