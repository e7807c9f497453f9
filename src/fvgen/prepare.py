"""`fvgen prepare`: photographs to shards of encoded training clips.

The work is cut into shards beforehand: each is a fixed run of (scene, clip) pairs, and everything random in a clip
comes from (seed, scene, clip) alone. So any number of processes, in any order, killed and started again, write the same
files; and a shard that is there and whole is never made twice.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.data.clips import Clip, render_clip
from fvgen.data.order import clean_context
from fvgen.data.photos import PhotoClip, photo_clip
from fvgen.data.point_maps import BACKENDS, point_maps
from fvgen.data.posed import Scene
from fvgen.data.quality import LIMITS, measure, verdict
from fvgen.data.shards import (
    CLOUD_POINTS,
    FORMAT,
    ClipRecord,
    Part,
    Settings,
    ShardClip,
    Skipped,
    describe,
    dump,
    part_file,
    read_content,
    read_part,
    shard_file,
    write_shard,
)
from fvgen.data.sources import Opened, Source, find_sources, open_source
from fvgen.data.windows import Window, clip_windows
from fvgen.errors import CannotWrite, UserError, did_you_mean
from fvgen.pipeline import ViewCrafterPipeline
from fvgen.presets import check_device, load_pipeline
from fvgen.storage import TEMPORARY, recover, writable_folder, write_json

FEW_WINDOWS = "no further smooth path"  # why a clip is missing, beside the reasons of `fvgen.data.quality`
VIEWCRAFTER_RADIUS = 0.01  # normalised device units, at frames of 288 rows or more
SMALL_RADIUS_PIXELS = 1.44  # in smaller frames: what 0.01 is at 288 rows, and the built-in scenes have


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


@dataclass(frozen=True)
class Job:
    """One shard: ``clips`` are (scene, number of the clip in it), scenes next to each other."""

    path: Path
    settings: Settings
    teacher: str
    clips: tuple[tuple[Source, int], ...]


Tick = Callable[[int], None]  # is called with the number of clips that are done, one way or another


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    max_stride: int = 4,
    teacher: str = "tiny",
    points: str = "auto",
    clips_per_scene: int = 8,
    known_views: int = 2,
    seed: int = 0,
    part: tuple[int, int] = (1, 1),
    workers: int | None = None,
    device: str = "cpu",
    half_pixel_shift: bool | None = None,
    clips_per_shard: int = 32,
    limits: dict[str, float] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tally:
    """Write the shards of part i of n, ``part`` = (i, n), to the folder ``out``; the same call again resumes.

    Args:
        sources: posed scenes, folders of photographs, videos, or folders of these, see `find_sources`.
        frames, size: of a clip (height, width); None is the teacher's own number, and 320x512 (48x64 for "tiny").
        max_stride: strides are drawn from 1 to this (FVGen: 4), see `clip_windows`.
        teacher: a preset or the folder of a `ViewCrafterPipeline`, whose encoders make latents and tokens.
        points: where depth comes from, see `point_maps`.
        clips_per_scene: how many are tried of each scene; what the filters drop is not made up for.
        known_views: frames that the cloud is made from, evenly spaced; the first and, from two on, the last are known.
        workers: processes with one thread each; None is one per core. They do not change a bit of the result.
        half_pixel_shift: see `unproject`; None is on for teachers with ViewCrafter's image preprocessing.
        limits: changes to `quality.LIMITS`.
        on_progress: called with the clips done so far and in all.

    Raises UserError for settings, folders or teachers that cannot work, and where not a single clip comes out. A scene
    or photograph that cannot be read is skipped and listed.
    """
    out, (index, parts) = Path(out), part
    if not 1 <= index <= parts:
        raise UserError(f"part {index}/{parts} does not exist; count from 1/{parts} to {parts}/{parts}")
    check_device(device)
    scenes = find_sources(sources)
    pipeline = load_pipeline(teacher, ViewCrafterPipeline)
    settings = judged_settings(
        scenes, pipeline, frames, size, max_stride, teacher, points, clips_per_scene, known_views, seed,
        half_pixel_shift, clips_per_shard, limits,
    )  # fmt: skip
    pairs = [(scene, number) for scene in scenes[index - 1 :: parts] for number in range(clips_per_scene)]
    jobs = [
        Job(out / shard_file(index, parts, number), settings, teacher, tuple(pairs[first : first + clips_per_shard]))
        for number, first in enumerate(range(0, len(pairs), clips_per_shard))
    ]
    claim(out, settings, index, parts)
    left = [job for job in jobs if read_content(job.path, settings) is None]
    ready = len(pairs) - sum(len(job.clips) for job in left)
    tick = (lambda count: on_progress(ready + count, len(pairs))) if on_progress else (lambda count: None)
    tick(0)
    workers = min(workers or os.cpu_count() or 1, max(1, len(left)))
    tally = _in_processes(left, workers, device, tick) if workers > 1 else _here(left, pipeline.to(device), tick)
    return finish(out, jobs, settings, index, parts, tally.seconds)


def judged_settings(
    scenes: Sequence[Source],
    pipeline: ViewCrafterPipeline,
    frames: int | None,
    size: tuple[int, int] | None,
    max_stride: int,
    teacher: str,
    points: str,
    clips_per_scene: int,
    known_views: int,
    seed: int,
    half_pixel_shift: bool | None,
    clips_per_shard: int,
    limits: dict[str, float] | None,
) -> Settings:
    """The arguments of `prepare` with what they leave open filled in. Raises UserError for those that cannot work."""
    frames = pipeline.unet.config.temporal_length if frames is None else frames
    height, width = size or ((48, 64) if teacher == "tiny" else (320, 512))
    if points not in BACKENDS and points != "auto":
        raise UserError(f"unknown source of points {points!r}{did_you_mean(points, [*BACKENDS, 'auto'])}")
    for name, value in (("max-stride", max_stride), ("clips-per-scene", clips_per_scene), ("height", height)):
        if value < 1:
            raise UserError(f"{name} {value} is too small; give at least 1")
    if not 1 <= known_views < frames:
        raise UserError(
            f"{known_views} known views do not suit {frames} frames; give at least 1, and fewer than frames"
        )
    for name in limits or {}:
        if name not in LIMITS:
            raise UserError(f"unknown limit {name!r}{did_you_mean(name, LIMITS)}")
    pipeline.check_size(height, width)
    published = pipeline.config.image_resize == "viewcrafter"
    return Settings(
        scenes=hashlib.sha256("\n".join(scene.name for scene in scenes).encode()).hexdigest(),
        frames=frames,
        height=height,
        width=width,
        max_stride=max_stride,
        known_views=known_views,
        points=points,
        clips_per_scene=clips_per_scene,
        clips_per_shard=clips_per_shard,
        seed=seed,
        radius=max(VIEWCRAFTER_RADIUS, 2 * SMALL_RADIUS_PIXELS / min(height, width)),
        half_pixel_shift=published if half_pixel_shift is None else half_pixel_shift,
        teacher=Path(teacher).name,
        encoder=pipeline.encoder_fingerprint(),
        limits=LIMITS | (limits or {}),
    )


def claim(out: Path, settings: Settings, index: int, parts: int) -> None:
    """Make ``out`` ours, or recognise it. Raises UserError for a folder with anything else in it."""
    mine = out / part_file(index, parts)
    if out.is_dir():
        found = sorted(path for path in out.iterdir() if TEMPORARY not in path.name)
        indices = [path for path in found if path.match("part-*-of-*.json")]
        foreign = [path for path in found if path not in indices and not path.match("shard-*-of-*.safetensors")]
        if foreign := foreign or (found if not indices else []):
            raise UserError(f"output folder {out} holds something else ({foreign[0].name}); choose another --out")
        cure = "choose another --out or delete it"
        for path in indices:
            theirs = read_part(path.read_text(errors="replace"), str(path))
            if theirs.parts != parts:
                raise UserError(f"{out} holds parts of {theirs.parts}, not of {parts}; {cure}")
            for key, value in settings.model_dump().items():
                if (other := getattr(theirs.settings, key)) != value:
                    raise UserError(f"{out} holds shards of other settings ({key}: {other!r}, not {value!r}); {cure}")
    writable_folder(out)
    if not mine.exists():
        begun = Part(
            format=FORMAT, part=index, parts=parts, complete=False, settings=settings, shards=[], dropped={}, skipped=[]
        )  # fmt: skip
        write_json(mine, dump(begun))


def finish(out: Path, jobs: Sequence[Job], settings: Settings, index: int, parts: int, seconds: Counter) -> Tally:
    """Write the part's index from what its shards say of themselves. Raises UserError where not one clip came out."""
    tally, records = Tally(seconds=seconds), []
    for job in jobs:
        content = read_content(job.path, settings)
        if content is None:
            raise UserError(
                f"shard {job.path} was damaged after it was written; run the same command again to remake it"
            )
        recover(job.path)  # what a kill may have left beside it
        records.append(describe(content, job.path))
        new = [entry for entry in content.skipped if entry not in tally.skipped]  # a scene may fill several shards
        tally.add(Tally(len(content.clips), Counter(content.dropped), new))
    if jobs and not tally.clips:
        for job in jobs:
            job.path.unlink()
        (out / part_file(index, parts)).unlink()
        said = [f"{count} x {reason}" for reason, count in tally.dropped.most_common()]
        said += [f"{entry.name}: {entry.reason}" for entry in tally.skipped[:1]]
        raise UserError(f"not one clip came out of {len(jobs[0].clips)} or more ({'; '.join(said)}); mend that")
    done = Part(
        format=FORMAT, part=index, parts=parts, complete=True, settings=settings, shards=records,
        dropped=dict(sorted(tally.dropped.items())), skipped=tally.skipped,
    )  # fmt: skip
    write_json(out / part_file(index, parts), dump(done))
    return tally


# --- One shard ---


def make_shard(job: Job, pipeline: ViewCrafterPipeline, tick: Callable[[], None]) -> Tally:
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


def encoded(item: Unencoded, pipeline: ViewCrafterPipeline) -> tuple[ClipRecord, ShardClip]:
    """Latents of truth and render, image and text tokens; posterior samples are drawn from the record's seed."""
    generator = torch.Generator().manual_seed(item.record.seed)
    latents = pipeline.encode_frames(item.clip.truth[None], generator)
    condition = pipeline.condition(item.clip.render[None], generator)
    text = pipeline.text_tokens()
    kept = torch.linspace(0, len(item.photo.points) - 1, CLOUD_POINTS).long()
    clip = ShardClip(
        latents=latents[0].cpu(),
        render_latents=condition.render_latents[0].cpu(),
        image_tokens=condition.context[0, text.shape[1] :].cpu(),
        known=item.clip.known,
        world_from_cam=item.photo.cameras.world_from_cam,
        intrinsics=item.photo.cameras.intrinsics,
        cloud_points=item.photo.points[kept],
        cloud_colors=(item.photo.colors[kept] * 255).round().byte(),
        text_tokens=text.cpu(),
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


# --- Processes ---


def _here(jobs: Sequence[Job], pipeline: ViewCrafterPipeline, tick: Tick) -> Tally:
    """One after the other, on one thread: with more, sums come out in another order and bits differ."""
    tally, done, threads = Tally(), 0, torch.get_num_threads()

    def count() -> None:
        nonlocal done
        done += 1
        tick(done)

    torch.set_num_threads(1)
    try:
        for job in jobs:
            tally.add(make_shard(job, pipeline, count))
    finally:
        torch.set_num_threads(threads)
    return tally


def _in_processes(jobs: Sequence[Job], workers: int, device: str, tick: Tick) -> Tally:
    """Shards side by side, in processes that share no threads and no GPU with this one: these do not survive a fork."""
    context, tally = clean_context("fvgen.prepare"), Tally()
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(done,))
    try:
        waiting = {pool.submit(_work, job, device) for job in jobs}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                tally.add(future.result())
            tick(done.value)
    finally:
        pool.shutdown(cancel_futures=True)
    return tally


_DONE: Any = None  # the counter that a worker shares with its parent


def _begin(done: Any) -> None:
    """A worker must not outlive a parent that was killed: its files would collide with those of the next run."""
    global _DONE
    _DONE = done
    torch.set_num_threads(1)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job, device: str) -> Tally:
    def count() -> None:
        with _DONE.get_lock():
            _DONE.value += 1

    return make_shard(job, _encoders(job.teacher, device), count)


@cache
def _encoders(teacher: str, device: str) -> ViewCrafterPipeline:
    """The teacher without its UNet, which encodes nothing and is the largest part."""
    pipeline = load_pipeline(teacher, ViewCrafterPipeline)
    pipeline.register_modules(unet=None)
    return pipeline.to(device)
