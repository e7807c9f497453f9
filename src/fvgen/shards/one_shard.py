"""One shard of `fvgen prepare`: from (scene, number) pairs to encoded clips in a file.

Everything random in a clip comes from (seed, scene, number) alone.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from fvgen.clips.clip import Clip, render_clip
from fvgen.clips.filters import measure, verdict
from fvgen.clips.photographed import PhotoClip, photo_clip
from fvgen.clips.windows import Window, clip_windows
from fvgen.depth.maps import point_maps
from fvgen.errors import CannotWrite, UserError
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.posing.sources import Opened, Source, open_source
from fvgen.scenes.scene import Scene
from fvgen.shards.format import CLOUD_POINTS, ClipRecord, Settings, ShardClip, Skipped, write_shard

FEW_WINDOWS = "no further smooth path"  # why a clip is missing, beside the reasons of `fvgen.clips.filters`


@dataclass
class Tally:
    """What became of the clips; seconds of processor time by step, over all processes."""

    clips: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.clips += other.clips
        self.dropped += other.dropped
        self.skipped += other.skipped
        self.seconds += other.seconds

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[step] += time.process_time() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """With more, sums come out in another order and bits differ; and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Job:
    """One shard: ``clips`` are (scene, number of the clip in it), scenes next to each other."""

    path: Path
    settings: Settings
    teacher: str
    clips: tuple[tuple[Source, int], ...]


def make_shard(job: Job, pipeline: TeacherPipeline, tick: Callable[[], None]) -> Tally:
    """Make and write a shard. ``tick`` is called for every clip, whatever becomes of it."""
    tally, made = Tally(), []
    for scene, pairs in groupby(job.clips, key=lambda pair: pair[0]):
        for result in scene_clips(scene, [number for _, number in pairs], job.settings, tally):
            if isinstance(result, Unencoded):
                with tally.timed("encode"):
                    made.append(encoded(result, pipeline))
            elif isinstance(result, Skipped):
                if result not in tally.skipped:  # a scene is listed once, not for each of its clips
                    tally.skipped.append(result)
            else:
                tally.dropped[result] += 1
            del result  # pixels of a clip need not outlive it
            tick()
    with tally.timed("write"):
        write_shard(job.path, job.settings, made, dict(sorted(tally.dropped.items())), tally.skipped)
    tally.clips = len(made)
    return tally


@dataclass(frozen=True)
class Unencoded:
    """A clip that passed the filters."""

    record: ClipRecord
    clip: Clip
    photo: PhotoClip


def scene_clips(
    entry: Source, numbers: Sequence[int], settings: Settings, tally: Tally
) -> Iterator[Unencoded | Skipped | str]:
    """For each number a clip, or why it was dropped, or what was wrong with the input."""
    try:
        with tally.timed("read"):
            opened = open_source(entry.path, settings.points)
        with tally.timed("choose"):
            generator = _generator(settings.seed, entry.name, "views")
            arguments = (opened.scene, settings.clips_per_scene, settings.frames, settings.max_stride, generator)
            windows = clip_windows(*arguments)
    except CannotWrite:
        raise
    except UserError as error:
        yield from [Skipped(name=entry.name, reason=str(error))] * len(numbers)
        return
    known = _evenly(settings.known_views, settings.frames)
    wanted = [windows[number].views[frame] for number in numbers if number < len(windows) for frame in known]
    with tally.timed("points"):
        maps = Depths(opened.scene, settings, wanted)
    for number in numbers:
        if number >= len(windows):
            yield FEW_WINDOWS
            continue
        try:
            yield _clip(entry, opened, number, windows[number], known, maps, settings, tally)
        except UserError as error:
            yield Skipped(name=f"{entry.name}-{number:02d}", reason=str(error))


def _clip(
    entry: Source,
    opened: Opened,
    number: int,
    window: Window,
    known: Sequence[int],
    maps: Depths,
    settings: Settings,
    tally: Tally,
) -> Unencoded | str:
    name, scene = f"{entry.name}-{number:02d}", opened.scene
    depth = torch.stack([maps[window.views[frame]] for frame in known])
    with tally.timed("load"):
        size = (settings.height, settings.width)
        photo = photo_clip(scene, name, window.views, known, *size, settings.half_pixel_shift, depth)
    with tally.timed("render"):
        clip, seen = render_clip(*photo, settings.radius)
    with tally.timed("filter"):
        figures = measure(clip, len(photo.points), seen, window.motion)
    if reason := verdict(figures, settings.limits):
        return reason
    record = ClipRecord(
        name=name,
        scene=entry.name,
        format=opened.format,
        frames=[scene.image_paths[view].name for view in window.views],
        known=list(known),
        stride=window.stride,
        points=maps.backend,
        seed=_seed(settings.seed, entry.name, number),
        figures=figures,
    )
    return Unencoded(record, clip, photo)


class Depths:
    """Depth by view, all from one call where that works: backends read and match all of a scene's photographs.

    Where it fails each view is tried alone, when it is asked for, and raises its UserError then.
    """

    def __init__(self, scene: Scene, settings: Settings, views: Sequence[int]) -> None:
        self._ask = lambda views: point_maps(scene, views, settings.height, settings.width, settings.points)
        self._maps: dict[int, Tensor] = {}
        self.backend = settings.points
        if unique := sorted(set(views)):
            with suppress(UserError):  # told by the view that it is about
                self._keep(unique)

    def __getitem__(self, view: int) -> Tensor:
        if view not in self._maps:
            self._keep([view])
        return self._maps[view]

    def _keep(self, views: list[int]) -> None:
        depth, self.backend = self._ask(views)
        self._maps |= dict(zip(views, depth, strict=True))


def encoded(item: Unencoded, pipeline: TeacherPipeline) -> tuple[ClipRecord, ShardClip]:
    """Latents of truth and render, image and text tokens; posterior samples are drawn from the record's seed."""
    generator = torch.Generator().manual_seed(item.record.seed)
    latents = pipeline.encode_frames(item.clip.truth[None], generator)
    condition = pipeline.condition(item.clip.render[None], generator)
    kept = torch.linspace(0, len(item.photo.points) - 1, CLOUD_POINTS).long()
    clip = ShardClip(
        latents=latents[0].cpu(),
        render_latents=condition["render_latents"][0].cpu(),
        image_tokens=condition["image_tokens"][0].cpu(),
        known=item.clip.known,
        world_from_cam=item.photo.cameras.world_from_cam,
        intrinsics=item.photo.cameras.intrinsics,
        cloud_points=item.photo.points[kept],
        cloud_colors=(item.photo.colors[kept] * 255).round().byte(),
        text_tokens=condition["text_tokens"].cpu(),
    )
    return item.record, clip


def _evenly(count: int, frames: int) -> list[int]:
    """``count`` of the frames 0..frames-1, ends included."""
    return [0] if count == 1 else [round(k * (frames - 1) / (count - 1)) for k in range(count)]


def _seed(*words: object) -> int:
    digest = hashlib.sha256(f"fvgen prepare {' '.join(map(str, words))}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _generator(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*words))
