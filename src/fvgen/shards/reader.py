"""Reading shards: encoded training clips in files that are whole, checked and self-describing (`shard_files`).

The clips of all parts are one data set, in an order that does not depend on the parts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fvgen.clips.clip import Clip, Others
from fvgen.clips.latents import LatentBatch, LatentSet, views_of
from fvgen.errors import UserError, first_line
from fvgen.geometry.cameras import Cameras
from fvgen.models.condition import CAMERA_PATH, Condition, joined
from fvgen.pipelines.cameras import clip_path
from fvgen.shards.format import (
    OTHERS,
    OTHERS_SHOWN,
    PER_CLIP,
    PIXELS,
    SHOWN,
    Part,
    ShardClip,
    Skipped,
    clip_number,
    clip_problem,
    condition_names,
    content_problem,
    part_file,
    read_header,
    read_part,
)
from fvgen.system.doors import not_finite, open_tensors
from fvgen.system.places import Place, open_place, sha256_of

OPEN_FILES = 32


class ShardSet(LatentSet):
    """All clips of a shard folder, local or remote (s3://, gs://, hf://: see `places`), read when asked for.

    A drop-in for the latents of a clip folder. Clips are in the order of their names, however many parts made them.
    Each shard's checksum is verified before its first use in a process. ``camera_paths``: conditions hold the path of
    their clip's cameras, whether or not the encoders that made the shards asked for it. ``views``: batches hold the
    clips' frames, too (`fvgen.clips.latents.views_of`).

    Raises UserError for shards without pixels where views are wanted, for a folder without shards, unfinished or
    missing parts, parts of different settings; and on reading, for a shard that is missing, truncated or altered.
    """

    def __init__(self, path: str | Path, camera_paths: bool = False, views: bool = False) -> None:
        self.place: Place = open_place(path)
        self.parts = _read_parts(self.place)
        self.settings = self.parts[0].settings
        self.shards = [shard for part in self.parts for shard in part.shards]
        entries = [
            (record.scene, clip_number(record), record, number, row)
            for number, shard in enumerate(self.shards)
            for row, record in enumerate(shard.clips)
        ]
        entries.sort(key=lambda entry: entry[:2])
        self.records = [entry[2] for entry in entries]
        self.shard_of = [entry[3] for entry in entries]  # of each clip
        self._rows = [entry[4] for entry in entries]
        self._open: OrderedDict[int, safe_open] = OrderedDict()
        self._verified: set[int] = set()
        self._kind: dict[str, tuple[str, list[int]]] = {}  # of all shards' tensors, but for the number of clips
        self._paths, self._views = camera_paths, views
        if views:
            self._check_pixels("training on their views")
        super().__init__({}, [record.name for record in self.records])
        self.frames, self.height, self.width = self.settings.frames, self.settings.height, self.settings.width

    def __getitem__(self, index: int) -> ShardClip:
        file, row = self._file(self.shard_of[index]), self._rows[index]
        try:
            own = {key: file.get_slice(key)[row] for key in PER_CLIP}
            slices = {name: file.get_slice(name) for name in condition_names(file.keys())}
            rows = {name: row if tensors.get_shape()[0] > 1 else 0 for name, tensors in slices.items()}
            clip = ShardClip(condition={name: slices[name][rows[name]] for name in slices}, **own)
        except (SafetensorError, OSError) as error:
            raise self._lying(index, error) from error
        if problem := clip_problem(clip):
            raise self._lying(index, ValueError(f"clip {self.names[index][:100]}: {problem}"))
        if self._paths:
            cameras = Cameras(clip.world_from_cam, clip.intrinsics, self.height, self.width)
            clip = clip._replace(condition={**clip.condition, CAMERA_PATH: clip_path(cameras)})
        return clip

    def clips(self) -> ShardClips:
        """The clips with their pixels. Raises UserError for shards that hold none."""
        self._check_pixels("scoring")
        return ShardClips(self)

    def _check_pixels(self, wanted_by: str) -> None:
        if not self.settings.keep_frames:
            raise UserError(
                f"the shards in {self.place} hold latents but no pixels, which {wanted_by} needs; prepare their scenes "
                "again with --keep-frames and another --out"
            )

    def clip(self, index: int) -> Clip:
        """One clip with its pixels and cameras, of shards that keep their frames."""
        shard, row = self._file(self.shard_of[index]), self._rows[index]
        try:
            truth, render = (shard.get_slice(key)[row].float() / 255 for key in PIXELS)
            shown = shard.get_slice(SHOWN)[row] if SHOWN in shard.keys() else None  # noqa: SIM118
            known, poses, intrinsics = (shard.get_slice(k)[row] for k in ("known", "world_from_cam", "intrinsics"))
            others = self._others(shard, row) if self.settings.others else None
        except (SafetensorError, OSError, ValueError) as error:
            raise self._lying(index, error) from error
        cameras = Cameras(poses, intrinsics, self.height, self.width)
        return Clip(self.names[index], truth, render, known, cameras, shown, others)

    def _others(self, shard: safe_open, row: int) -> Others:
        """Raises ValueError for cameras that are none."""
        images, poses, intrinsics = (shard.get_slice(key)[row] for key in OTHERS)
        if (name := not_finite(zip(OTHERS, (images, poses, intrinsics), strict=True))) is not None:
            raise ValueError(f"{name} holds NaN or an infinity")
        shown = shard.get_slice(OTHERS_SHOWN)[row] if OTHERS_SHOWN in shard.keys() else None  # noqa: SIM118
        return Others(images.float() / 255, Cameras(poses, intrinsics, self.height, self.width), shown=shown)

    def batch(self, indices: Tensor | Sequence[int], device: str | torch.device = "cpu") -> LatentBatch:
        """The clips at ``indices`` as one batch, with their frames as views where those are wanted."""
        clips = [self[int(index)] for index in indices]
        latents = torch.stack([clip.latents for clip in clips])
        named = {name: torch.stack([clip.condition[name] for clip in clips]) for name in clips[0].condition}
        condition = Condition(**named).to(device, non_blocking=True)
        views = None
        if self._views:
            views = joined([views_of(self.clip(int(index))) for index in indices]).to(device, non_blocking=True)
        return LatentBatch(latents.to(device, non_blocking=True), condition, views)

    def check_encoder(self, fingerprint: str, model: str) -> None:
        """Raises UserError where the latents were made by other encoders than those of ``model``."""
        if fingerprint != self.settings.encoder:
            made_by = self.settings.teacher
            state = "has other encoders by now" if made_by == Path(model).name else f"has other encoders than {model}"
            raise UserError(
                f"the shards in {self.place} were encoded by teacher {made_by}, which {state}; give the one that made "
                "them, or prepare the shards again"
            )

    def verify(self) -> None:
        """Read every shard and compare its checksum."""
        for number in range(len(self.shards)):
            self._file(number)

    def dropped(self) -> dict[str, int]:
        """Over all parts: how many clips were dropped, by reason."""
        reasons = sorted({reason for part in self.parts for reason in part.dropped})
        return {reason: sum(part.dropped.get(reason, 0) for part in self.parts) for reason in reasons}

    def skipped(self) -> list[Skipped]:
        return [entry for part in self.parts for entry in part.skipped]

    def __getstate__(self) -> dict:
        """For worker processes: open files stay behind."""
        return {**self.__dict__, "_open": OrderedDict(), "_verified": set()}

    def _file(self, number: int) -> safe_open:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        path = self.place.local(shard.file, shard.sha256)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise self._damaged(shard.file, "is missing") from error
        if size != shard.bytes:
            raise self._damaged(shard.file, f"has {size} bytes instead of {shard.bytes}")
        if number not in self._verified:
            if sha256_of(path) != shard.sha256:
                raise self._damaged(shard.file, "was altered (its SHA-256 is not the recorded one)")
            self._verified.add(number)
        try:
            file = open_tensors(path)
            content = read_header(file)
        except (SafetensorError, OSError, ValidationError, UserError) as error:
            raise self._damaged(shard.file, f"cannot be read ({first_line(error)})") from error
        if (content.settings, content.clips) != (self.settings.digest(), shard.clips):
            raise self._damaged(shard.file, "was made of other clips or settings than its index says")
        if problem := content_problem(file, self.settings, shard.clips):
            raise self._damaged(shard.file, f"{problem}, although its checksum is right")
        kind = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        sometimes = (SHOWN, OTHERS_SHOWN)
        kind = {key: (x.get_dtype(), x.get_shape()[1:]) for key, x in kind.items() if key not in sometimes}
        self._kind = self._kind or kind
        if kind and kind != self._kind:
            other = sorted(key for key in {*kind, *self._kind} if kind.get(key) != self._kind.get(key))[0]
            raise self._damaged(shard.file, f"has {other[:100]} of another kind than the other shards")
        self._open[number] = file
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[number]

    def _lying(self, index: int, error: Exception) -> UserError:
        name = self.shards[self.shard_of[index]].file
        return self._damaged(name, f"does not hold what its index says ({first_line(error)})")

    def _damaged(self, file: str, what: str) -> UserError:
        return UserError(
            f"shard {self.place}/{file} {what}; copy it again, or delete it and its part-*.json and prepare again"
        )


class ShardClips(Sequence[Clip]):
    """The clips of a `ShardSet` as a folder of clips has them, read when asked for."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards, self.names = shards, shards.names
        self.frames, self.height, self.width = shards.frames, shards.height, shards.width

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Clip:
        return self.shards.clip(range(len(self))[index])


def holds_shards(path: str | Path) -> bool:
    """Whether ``path`` is meant as a shard folder: an address, or a folder with the index of a part."""
    return "://" in str(path) or any(Path(path).glob("part-*-of-*.json"))


def _read_parts(place: Place) -> list[Part]:
    names = place.names("part-*-of-*.json")
    if not names:
        raise UserError(f"{place} holds no shards (no part-*.json); give a folder that `fvgen prepare` wrote")
    parts = sorted((read_part(place.text(name), f"{place}/{name}") for name in names), key=lambda part: part.part)
    total = parts[0].parts
    for part in parts:
        if part.parts != total:
            raise UserError(
                f"{place} mixes parts of {total} and of {part.parts}; keep one run's files and delete the others"
            )
        if part.settings != parts[0].settings:
            raise UserError(
                f"{place}: parts {parts[0].part} and {part.part} have different settings; prepare one again"
            )
        if not part.complete:
            raise UserError(f"{place}/{part_file(part.part, total)} is unfinished; run its `fvgen prepare` again")
    names = [shard.file for part in parts for shard in part.shards]
    if len(set(names)) < len(names):
        raise UserError(f"{place} lists a shard in two of its part-*.json; prepare one of them again")
    missing = sorted(set(range(1, total + 1)) - {part.part for part in parts})
    if missing:
        raise UserError(f"{place} lacks part {missing[0]} of {total}; run `fvgen prepare --part {missing[0]}/{total}`")
    listed = {shard.file for part in parts for shard in part.shards}
    if unlisted := sorted(set(place.names("shard-*-of-*.safetensors")) - listed):
        raise UserError(f"shard {place}/{unlisted[0]} is in no part-*.json; run its `fvgen prepare` again")
    if not any(shard.clips for part in parts for shard in part.shards):
        raise UserError(f"{place} holds no clip: all were dropped or skipped; prepare other scenes or settings")
    return parts
