"""One shard of `fvgen prepare`: from (scene, number) pairs to encoded clips in a file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path

import torch

from fvgen.clips.clip import shown_of, to_bytes
from fvgen.clips.from_scene import ClipSettings, Lost, SceneClip, scene_clips
from fvgen.clips.latents import encoded_condition
from fvgen.errors import UserError
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.posing.sources import Source
from fvgen.shards.format import CLOUD_POINTS, ClipRecord, Pixels, Settings, ShardClip, Skipped, write_shard


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

    def miss(self, lost: Lost) -> None:
        """Count a clip that there is not; a scene that cannot be read is listed once, not for each of its clips."""
        if not lost.broken:
            self.dropped[lost.reason] += 1
        elif (entry := Skipped(name=lost.name, reason=lost.reason)) not in self.skipped:
            self.skipped.append(entry)

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


def make_shard(job: Job, pipeline: NovelViewPipeline, tick: Callable[[], None]) -> Tally:
    """Make and write a shard. ``tick`` is called for every clip, whatever becomes of it."""
    tally, made, pixels = Tally(), [], []
    settings = ClipSettings(**{one.name: getattr(job.settings, one.name) for one in fields(ClipSettings)})
    for scene, pairs in groupby(job.clips, key=lambda pair: pair[0]):
        for result in scene_clips(scene, [number for _, number in pairs], settings, tally.timed):
            if isinstance(result, Lost):
                tally.miss(result)
            elif (clip := _encoded(result, pipeline, tally)) is not None:
                made.append((record_of(result), clip))
                if job.settings.keep_frames:
                    frames = map(to_bytes, (result.clip.truth, result.clip.render))
                    pixels.append(Pixels(*frames, shown_of(result.clip), result.clip.others))
            del result  # its floats need not outlive it
            tick()
    with tally.timed("write"):
        write_shard(job.path, job.settings, made, dict(sorted(tally.dropped.items())), tally.skipped, pixels)
    tally.clips = len(made)
    return tally


def _encoded(made: SceneClip, pipeline: NovelViewPipeline, tally: Tally) -> ShardClip | None:
    """None for a clip that the model refuses, which is counted: a path of cameras, say, that does not move."""
    try:
        with tally.timed("encode"):
            return encoded(made, pipeline)
    except UserError as error:
        tally.miss(Lost(made.scene, str(error), broken=True))
        return None


def record_of(made: SceneClip) -> ClipRecord:
    """Where a clip comes from, for the shard's header and the part's index."""
    return ClipRecord(
        name=made.clip.name,
        scene=made.scene,
        format=made.format,
        frames=made.files,
        known=made.known,
        stride=made.stride,
        points=made.backend,
        seed=made.seed,
        figures=made.figures,
    )


def encoded(made: SceneClip, pipeline: NovelViewPipeline) -> ShardClip:
    """Latents of truth and render, and the condition; posterior samples are drawn from the clip's seed."""
    generator = torch.Generator().manual_seed(made.seed)
    latents = pipeline.encode_frames(made.clip.truth[None], generator)
    condition = encoded_condition(made.clip, pipeline, generator)
    kept = torch.linspace(0, len(made.points) - 1, CLOUD_POINTS).long()
    return ShardClip(
        latents=latents[0].cpu(),
        condition={name: tensor[0].cpu() for name, tensor in condition.items()},
        known=made.clip.known,
        world_from_cam=made.clip.cameras.world_from_cam,
        intrinsics=made.clip.cameras.intrinsics,
        cloud_points=made.points[kept],
        cloud_colors=(made.colors[kept] * 255).round().byte(),
    )
