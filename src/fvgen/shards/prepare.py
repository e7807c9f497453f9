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
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fvgen.clips.filters import LIMITS
from fvgen.depth.maps import judge_source, not_here
from fvgen.errors import UserError, did_you_mean, short
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.pipelines.folders import check_device
from fvgen.posing.sources import Source, find_sources
from fvgen.shards.encoders import encoders, load_encoders, placed, render_needs
from fvgen.shards.format import (
    FORMAT,
    Part,
    Settings,
    describe,
    dump,
    part_file,
    read_content,
    read_part,
    shard_file,
)
from fvgen.shards.one_shard import Job, Tally, make_shard, one_thread
from fvgen.shards.order import clean_context
from fvgen.system.doors import read_text
from fvgen.system.files import TEMPORARY, busy, judge_output, recover, writable_folder, write_json

AS_GIVEN = (
    "max_stride",
    "points",
    "clips_per_scene",
    "clips_per_shard",
    "known_views",
    "seed",
    "keep_frames",
    "others",
)

MOST = 1_000_000  # clips of a scene or a shard
Tick = Callable[[int], None]  # is called with the number of clips that are done, one way or another


@dataclass(frozen=True)
class PrepareConfig:
    """What decides about the clips, beside their sources.

    frames, size: of a clip (height, width); None is what the teacher was trained with, see `render_needs`.
    max_stride: strides are drawn from 1 to this (FVGen: 4), see `clip_windows`.
    teacher: a preset or the folder of a teacher or student, whose encoders make latents and tokens.
    points: where depth comes from, see `point_maps`; "dust3r" also poses what has no poses.
    clips_per_scene: how many are tried of each scene; what the filters drop is not made up for.
    known_views: frames that the cloud is made from, evenly spaced; the first and, from two on, the last are known.
    half_pixel_shift: see `unproject`; None is what the teacher was trained with.
    closed: renders without holes, see `fvgen.geometry.closing`; None is what the model wants (one that leaps does).
    limits: changes to `filters.LIMITS`.
    keep_frames: keep the pixels too, so that models can be scored on the clips: 16 MB a clip of 16 frames at 320x512.
    others: with them, so many photographs of the scene that are not in the clip but near it; clips that have fewer are
        dropped.
    """

    frames: int | None = None
    size: tuple[int, int] | None = None
    max_stride: int = 4
    teacher: str = "tiny"
    points: str = "auto"
    clips_per_scene: int = 8
    clips_per_shard: int = 32
    known_views: int = 2
    seed: int = 0
    half_pixel_shift: bool | None = None
    closed: bool | None = None
    limits: dict[str, float] = field(default_factory=dict)
    keep_frames: bool = False
    others: int = 0

    def settings(self, scenes: Sequence[Source], pipeline: NovelViewPipeline) -> Settings:
        """With what is left open filled in. Raises UserError for what cannot work."""
        judge_source(self.points)
        if (lack := not_here(self.points)) is not None:
            raise UserError(f"points {self.points} cannot be had here: {lack}; choose another source of points")
        for name in ("max_stride", "clips_per_scene", "clips_per_shard"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} {getattr(self, name)} is too small; give at least 1")
            if getattr(self, name) > MOST:
                raise UserError(f"{name.replace('_', '-')} {short(getattr(self, name))} is more than {MOST}; give less")
        if self.others and not self.keep_frames:
            raise UserError(f"others {self.others} has no effect without --keep-frames; add it")
        for name in self.limits:
            if name not in LIMITS:
                raise UserError(f"unknown limit {name!r}{did_you_mean(name, LIMITS)}")
        needs = render_needs(pipeline, self.frames, self.size, self.half_pixel_shift, self.closed)
        if not 1 <= self.known_views < needs.frames:
            raise UserError(
                f"{self.known_views} known views do not suit {needs.frames} frames; "
                "give at least 1, and fewer than frames"
            )
        return Settings(
            scenes=hashlib.sha256("\n".join(scene.name for scene in scenes).encode()).hexdigest(),
            **needs._asdict(),
            teacher=Path(self.teacher).name,
            encoder=pipeline.encoder_fingerprint(),
            limits=LIMITS | self.limits,
            **{name: getattr(self, name) for name in AS_GIVEN},
        )


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    *,
    part: tuple[int, int] = (1, 1),
    workers: int | None = None,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
    **choices: Any,
) -> Tally:
    """Write the shards of part i of n, ``part`` = (i, n), to the folder ``out``; the same call again resumes.

    Args:
        sources: posed scenes, folders of photographs, videos, or folders of these, see `find_sources`.
        frames, size, choices: the fields of `PrepareConfig`.
        workers: processes with one thread each; None is one per core. They do not change a bit of the result.
        device: of the encoders.
        on_progress: called with the clips done so far and in all.

    Raises UserError for settings, folders or teachers that cannot work, and where not a single clip comes out. A scene
    or photograph that cannot be read is skipped and listed.
    """
    out, (index, parts) = judge_output(out, inputs=sources), part
    config = PrepareConfig(frames, size, **choices)
    if not 1 <= index <= parts:
        raise UserError(f"part {index}/{parts} does not exist; count from 1/{parts} to {parts}/{parts}")
    check_device(device)
    scenes = find_sources(sources)
    pipeline = load_encoders(config.teacher)
    settings = config.settings(scenes, pipeline)
    jobs = _jobs(out, config, settings, scenes, index, parts)
    with busy(out / part_file(index, parts)):
        return _made(out, jobs, settings, part, pipeline, device, workers, on_progress)


def _made(
    out: Path,
    jobs: Sequence[Job],
    settings: Settings,
    part: tuple[int, int],
    pipeline: NovelViewPipeline,
    device: str,
    workers: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> Tally:
    """The judged part, as `prepare` says."""
    index, parts = part
    claim(out, settings, index, parts)
    left = [job for job in jobs if read_content(job.path, settings) is None]
    total = sum(len(job.clips) for job in jobs)
    ready = total - sum(len(job.clips) for job in left)
    tick = (lambda count: on_progress(ready + count, total)) if on_progress else (lambda count: None)
    tick(0)
    workers = min(workers or os.cpu_count() or 1, max(1, len(left)))
    tally = _in_processes(left, workers, device, tick) if workers > 1 else _here(left, placed(pipeline, device), tick)
    return finish(out, jobs, settings, index, parts, tally.seconds)


def _jobs(
    out: Path, config: PrepareConfig, settings: Settings, scenes: Sequence[Source], index: int, parts: int
) -> list[Job]:
    """The shards of a part: every n-th scene is its."""
    pairs = [(scene, number) for scene in scenes[index - 1 :: parts] for number in range(settings.clips_per_scene)]
    starts = range(0, len(pairs), settings.clips_per_shard)
    return [
        Job(
            out / shard_file(index, parts, number),
            settings,
            config.teacher,
            tuple(pairs[start : start + settings.clips_per_shard]),
        )
        for number, start in enumerate(starts)
    ]


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
            theirs = read_part(read_text(path, errors="replace"), str(path))
            if theirs.parts != parts:
                raise UserError(f"{out} holds parts of {theirs.parts}, not of {parts}; {cure}")
            for key in Settings.model_fields:
                if (other := getattr(theirs.settings, key)) != (value := getattr(settings, key)):
                    in_words = {  # where the values are hashes
                        "scenes": "other scenes",
                        "encoder": f"another teacher {settings.teacher}, with other encoders",
                    }
                    what = in_words.get(key, f"other settings ({key}: {other!r}, not {value!r})")
                    raise UserError(f"{out} holds shards of {what}; {cure}")
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
    if jobs and not tally.clips and parts == 1:  # other parts of an array may have some
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


# --- Processes ---


def _here(jobs: Sequence[Job], pipeline: NovelViewPipeline, tick: Tick) -> Tally:
    """One after the other, in this process."""
    tally, done = Tally(), 0

    def count() -> None:
        nonlocal done
        done += 1
        tick(done)

    with one_thread():
        for job in jobs:
            tally.add(make_shard(job, pipeline, count))
    return tally


def _in_processes(jobs: Sequence[Job], workers: int, device: str, tick: Tick) -> Tally:
    """Shards side by side, in processes that share no threads and no GPU with this one: these do not survive a fork."""
    context, tally = clean_context("fvgen.shards.prepare"), Tally()
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(done, dict(os.environ)))
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


def _begin(done: Any, environment: dict[str, str]) -> None:
    """A worker must not outlive a parent that was killed: its files would collide with those of the next run. And a
    fork server keeps the ``environment`` that it was started in, which may be an older one."""
    global _DONE
    _DONE = done
    os.environ.update(environment)
    torch.set_num_threads(1)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job, device: str) -> Tally:
    def count() -> None:
        with _DONE.get_lock():
            _DONE.value += 1

    return make_shard(job, encoders(job.teacher, device), count)
