"""The files of a shard folder: what they hold, and how they are written. docs/data.md has the layout.

A folder holds, for each part of a job array, ``part-I-of-N.json`` (settings, checksums, where each clip comes from) and
``shard-I-of-N-K.safetensors``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fvgen.clips.clip import Others, shown_of, to_bytes
from fvgen.errors import UserError, first_line, first_problem
from fvgen.system.doors import NUMBERS, not_finite, open_tensors, there
from fvgen.system.files import write_tensors
from fvgen.system.places import sha256_of

FORMAT = 1
MOST_PARTS = 100_000  # of a job array
CLOUD_POINTS = 512  # of each clip's cloud that are kept, for pictures
PER_CLIP = (
    "latents",
    "known",
    "world_from_cam",
    "intrinsics",
    "cloud_points",
    "cloud_colors",
)
PIXELS = ("truth", "render")  # in shards that keep their frames
SHOWN = "shown"  # in those of them where a photograph has a mask
OTHERS = ("other_images", "other_world_from_cam", "other_intrinsics")  # of other photographs
OTHERS_SHOWN = "other_shown"
RESERVED = (*PER_CLIP, *PIXELS, SHOWN, *OTHERS, OTHERS_SHOWN)


def condition_names(keys: Iterable[str]) -> list[str]:
    """Those of a shard's tensors that belong to the condition: all that have no meaning of their own here."""
    return [key for key in keys if key not in RESERVED]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClipRecord(Record):
    """Where a clip comes from. stride None: views chosen by pose; points: source of the depth of its known frames, "+"
    between several; seed: of its posterior samples; figures: of `fvgen.clips.filters`."""

    name: str
    scene: str
    format: str
    frames: list[str]
    known: list[int]
    stride: int | None
    points: str
    seed: int
    figures: dict[str, float]


class Skipped(Record):
    """A scene or clip that could not be made, and the sentence that says why."""

    name: str
    reason: str


class Content(Record):
    """What a shard says of itself, in its header. ``digest``: SHA-256 of its tensors' bytes, in the order of names."""

    settings: str
    digest: str
    clips: list[ClipRecord]
    dropped: dict[str, int]
    skipped: list[Skipped]


class ShardRecord(Record):
    file: str = Field(pattern=r"^shard-\d+-of-\d+-\d+\.safetensors$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # part of a path in the cache
    bytes: int = Field(ge=0)
    clips: list[ClipRecord]


class Settings(Record):
    """All that decides what the clips are. ``scenes``: SHA-256 over the names of all scenes; ``encoder``: fingerprint
    of the teacher's encoders; ``limits``: of `fvgen.clips.filters`; ``keep_frames``: `Pixels` too; ``closed``: renders
    are (`fvgen.geometry.closing`); ``others``: other photographs of the scene in them, too."""

    scenes: str
    frames: int = Field(ge=1, le=1 << 16)
    height: int = Field(ge=1, le=1 << 16)
    width: int = Field(ge=1, le=1 << 16)
    max_stride: int
    known_views: int
    points: str
    clips_per_scene: int
    clips_per_shard: int
    seed: int
    radius: float
    half_pixel_shift: bool
    teacher: str
    encoder: str
    limits: dict[str, float]
    keep_frames: bool = False
    closed: bool = False
    others: int = Field(0, ge=0, le=1 << 16)

    @model_serializer(mode="wrap")
    def _as_before(self, write: Callable[[Settings], dict]) -> dict:
        """Shards without frames, or with open renders, say of themselves, and hash, what they did before there were
        others."""
        return {key: x for key, x in write(self).items() if x or key not in ("keep_frames", "closed", "others")}

    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Part(Record):
    """``part-I-of-N.json``: written when the part begins, and again, complete, when it ends."""

    format: Literal[1]
    part: int = Field(ge=1, le=MOST_PARTS)
    parts: int = Field(ge=1, le=MOST_PARTS)
    complete: bool
    settings: Settings
    shards: list[ShardRecord]
    dropped: dict[str, int]
    skipped: list[Skipped]


class ShardClip(NamedTuple):
    """One clip: latents [C, F, h, w]; its condition's tensors by the names that the teacher's family gives; known [F]
    bool; world_from_cam [F, 4, 4], intrinsics [F, 3, 3] in pixels; cloud_points [P, 3], cloud_colors [P, 3] uint8."""

    latents: Tensor
    condition: dict[str, Tensor]
    known: Tensor
    world_from_cam: Tensor
    intrinsics: Tensor
    cloud_points: Tensor
    cloud_colors: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of them by the names that they have in a shard."""
        own = self._asdict()
        return own.pop("condition") | own


class Pixels(NamedTuple):
    """A clip's frames, uint8 [F, 3, H, W]: the photographs, and the render with the known ones in it; `Clip.shown`,
    written out; and other views, where the clip has any."""

    truth: Tensor
    render: Tensor
    shown: Tensor
    others: Others | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All of them by the names that they have in a shard."""
        own = dict(zip((*PIXELS, SHOWN), self, strict=False))
        if (others := self.others) is not None:
            cameras = others.cameras
            parts = to_bytes(others.images), cameras.world_from_cam, cameras.intrinsics, shown_of(others)
            own |= dict(zip((*OTHERS, OTHERS_SHOWN), parts, strict=True))
        return own


# --- Shards ---


def shard_file(part: int, parts: int, number: int) -> str:
    return f"shard-{part}-of-{parts}-{number:05d}.safetensors"


def write_shard(
    path: Path,
    settings: Settings,
    clips: Sequence[tuple[ClipRecord, ShardClip]],
    dropped: dict[str, int],
    skipped: Sequence[Skipped],
    pixels: Sequence[Pixels] = (),
) -> None:
    """Write a shard, whole or not at all; ``pixels`` of every clip or of none. Raises UserError for a full disk."""
    tensors: dict[str, Tensor] = {}
    if clips:
        tensors = {key: torch.stack([getattr(clip, key) for _, clip in clips]).contiguous() for key in PER_CLIP}
        names = clips[0][1].condition
        assert set(condition_names(names)) == set(names), f"a condition must not be called {', '.join(RESERVED)}"
        tensors |= {name: _stacked([clip.condition[name] for _, clip in clips]) for name in names}
        if pixels:
            rows = [each.tensors() for each in pixels]
            tensors |= {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            for name in (SHOWN, OTHERS_SHOWN):
                if name in tensors and tensors[name].all():
                    del tensors[name]
    content = Content(
        settings=settings.digest(),
        digest=_digest(tensors),
        clips=[record for record, _ in clips],
        dropped=dropped,
        skipped=list(skipped),
    )
    # One key only: the order of several in the header would be a matter of chance.
    write_tensors(path, tensors, {"fvgen": content.model_dump_json()})


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """[N, ...] of N clips, or one row where it is the same for all (a prompt, say)."""
    same = all(torch.equal(row, rows[0]) for row in rows[1:])
    return rows[0][None].clone() if same else torch.stack(list(rows))


def read_content(path: Path, settings: Settings) -> Content | None:
    """What a shard of these settings says of itself; None where it is missing, damaged or of other settings."""
    if not there(path):
        return None
    try:
        with open_tensors(path) as file:
            content = read_header(file)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValidationError, UserError):
        return None
    return content if (content.settings, content.digest) == (settings.digest(), _digest(tensors)) else None


def read_header(file: safe_open) -> Content:
    """Raises ValidationError for a file that is no shard."""
    return Content.model_validate_json((file.metadata() or {}).get("fvgen", ""))


def content_problem(file: safe_open, settings: Settings, clips: Sequence[ClipRecord]) -> str | None:
    """How the shapes and types of a shard's tensors contradict what its index says, in words; None where they do not.
    Nothing but the header is read."""
    count, frames = len(clips), settings.frames
    expected: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "latents": ("F32", (count, None, None, None, None)),
        "known": ("BOOL", (count, frames)),
        "world_from_cam": ("F32", (count, frames, 4, 4)),
        "intrinsics": ("F32", (count, frames, 3, 3)),
        "cloud_points": ("F32", (count, None, 3)),
        "cloud_colors": ("U8", (count, None, 3)),
    }
    if settings.keep_frames:
        expected |= dict.fromkeys(PIXELS, ("U8", (count, frames, None, settings.height, settings.width)))
    if others := settings.others:
        sizes = (3, settings.height, settings.width), (4, 4), (3, 3)
        kinds = zip(OTHERS, ("U8", "F32", "F32"), sizes, strict=True)
        expected |= {name: (kind, (count, others, *each)) for name, kind, each in kinds}
    found = {key: file.get_slice(key) for key in file.keys()} if count else {}  # noqa: SIM118
    found = {key: (tensor.get_dtype(), tuple(tensor.get_shape())) for key, tensor in found.items()}
    for key, (kind, shape) in expected.items() if count else ():
        if key not in found:
            return f"lacks {key}"
        said, sizes = found[key]
        fits = len(sizes) == len(shape) and all(b in (None, a) and a > 0 for a, b in zip(sizes, shape, strict=True))
        if said != kind or not fits:
            return f"has {key} of {said} {list(sizes)}, not {kind} {['?' if n is None else n for n in shape]}"
    for name, views in ((SHOWN, frames), (OTHERS_SHOWN, settings.others)):
        if name in found and found[name] != ("BOOL", (count, views, settings.height, settings.width)):
            return f"has {name} of {found[name][0]} {list(found[name][1])}, not one a pixel"
    if found and found["cloud_points"][1] != found["cloud_colors"][1]:
        return "has other points than colours"
    for name in condition_names(found):
        said, sizes = found[name]
        if said not in (*NUMBERS, "I64", "I32") or len(sizes) < 1 or sizes[0] not in (1, count) or 0 in sizes:
            return f"has {name[:100]} of {said} {list(sizes)} for {count} clips"
    for record in clips:
        if len(record.frames) != frames or not all(0 <= view < frames for view in record.known):
            return f"lists clip {record.name[:100]} with {len(record.frames)} frames, not {frames}"
    return None


def clip_problem(clip: ShardClip) -> str | None:
    """What is wrong with a clip's values, in words; None for nothing. One pass over what was read."""
    if (name := not_finite(clip.tensors().items())) is not None:
        return f"{name[:100]} holds NaN or an infinity"
    return None if (clip.intrinsics[:, [0, 1], [0, 1]] > 0).all() else "a focal length is not positive"


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode())
        digest.update(tensors[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- The index of a part ---


def part_file(part: int, parts: int) -> str:
    return f"part-{part}-of-{parts}.json"


def read_part(text: str, name: str) -> Part:
    """Raises UserError for anything but the index of a part."""
    try:
        part = Part.model_validate_json(text)
        files = [shard.file for shard in part.shards]
        names = [record.name for shard in part.shards for record in shard.clips]
        for what, listed in (("shard", files), ("clip", names)):
            if len(set(listed)) < len(listed):
                twice = next(entry for entry, count in Counter(listed).items() if count > 1)
                raise ValueError(f"it lists {what} {twice[:100]} twice")
        if name.rsplit("/", 1)[-1] != part_file(part.part, part.parts):
            raise ValueError("its numbers are not those of its name")
        for shard in part.shards:
            for record in shard.clips:
                clip_number(record)
        return part
    except (ValueError, IndexError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else first_line(error)
        raise UserError(f"{name} is no index of shards ({reason}); copy it again or prepare the shards again") from None


def clip_number(record: ClipRecord) -> int:
    """Of a clip among those of its scene. Raises ValueError or IndexError for a name without one."""
    digits = record.name.rsplit("-", 1)[1]
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 16):
        raise ValueError(f"clip {record.name[:100]} has no number")
    return int(digits)


def describe(content: Content, path: Path) -> ShardRecord:
    """A shard's line in the index."""
    return ShardRecord(file=path.name, sha256=sha256_of(path), bytes=path.stat().st_size, clips=content.clips)


def dump(part: Part) -> object:
    """As JSON values."""
    return part.model_dump(mode="json")
