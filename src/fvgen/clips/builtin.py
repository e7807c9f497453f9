"""The built-in data set on disk: made once, kept in the user's cache folder.

FVGEN_CACHE names that folder; the default is ``fvgen`` under the user's usual cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from rich.progress import track

from fvgen.clips.clip import Clip
from fvgen.clips.folder import ClipFolder, save_clips
from fvgen.clips.rooms import GENERATION, USUAL, synthetic_clip
from fvgen.clips.worlds import World
from fvgen.errors import UserError

FRAMES, HEIGHT, WIDTH = 8, 48, 64  # the tiny preset's size
DATA_SEED = 0  # the data set is one data set: seeds of runs do not change it


def cache_folder() -> Path:
    """Where things that can be made again are kept."""
    # A variable that is set to nothing counts as unset.
    if named := os.environ.get("FVGEN_CACHE"):
        return Path(named)
    if usual := os.environ.get("XDG_CACHE_HOME"):
        return Path(usual) / "fvgen"
    try:
        return Path.home() / ".cache" / "fvgen"
    except RuntimeError as error:  # a user whom the system does not know
        raise UserError("there is no home folder for fvgen's cache; name a folder for it in FVGEN_CACHE") from error


def builtin_clips(
    split: str,
    count: int,
    workers: int | None = None,
    world: World = USUAL,
    frames: int | None = None,
    others: int = 0,
) -> ClipFolder:
    """The first ``count`` clips of a split ("train" or "test"), from the cache or made now (0.2 s each on one core);
    of `FRAMES` frames or as many as are asked for, with ``others`` views off each path."""
    name = f"{world.name}-{split}" if world.name else split
    length = "" if frames in (None, FRAMES) else f"-{frames}frames"
    more = f"-{others}others" if others else ""
    path = cache_folder() / f"builtin-{GENERATION}-{name}-{count}{length}{more}"
    if not (path / "index.json").exists():
        made = _make(split, count, workers or os.cpu_count() or 1, world, frames or FRAMES, others)
        clips = list(track(made, f"scenes ({name})", total=count))
        save_clips(path, clips, {"kind": "builtin", "generation": GENERATION, "split": name, "seed": DATA_SEED})
    return ClipFolder(path)


def _make(split: str, count: int, workers: int, world: World, frames: int, others: int) -> Iterator[Clip]:
    job = partial(_one, split, world, frames, others)
    if workers == 1 or count < 8:
        yield from map(job, range(count))
        return
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(job, range(count), chunksize=4)


def _one(split: str, world: World, frames: int, others: int, index: int) -> Clip:
    return synthetic_clip(split, DATA_SEED, index, frames, HEIGHT, WIDTH, world, others)
