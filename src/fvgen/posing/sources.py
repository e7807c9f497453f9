"""What scenes are taken from: posed scenes in any known format or in chunks, folders of photographs, video files.

Photographs without poses get them when they are first opened. The posed scene is kept in fvgen's cache, under the
SHA-256 of what it was made from, never beside the user's files: so it is made once, whoever asks, and the same
photographs give the same scene for as long as the cache lasts, and, with the same pycolmap, after it.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from fvgen.clips.builtin import cache_folder
from fvgen.errors import CannotWrite, UserError
from fvgen.posing.chunks import SUFFIX, chunk_scenes, in_chunk, scene_of_chunk
from fvgen.posing.reconstruct import LEFT_OUT, pose_photographs
from fvgen.scenes.formats import read_scene, scene_format
from fvgen.scenes.readers.photographs import (
    VIDEOS,
    Photographs,
    extract_video,
    holds_photographs,
    photographs_of,
    read_photographs,
)
from fvgen.scenes.scene import Scene
from fvgen.system.doors import read_json
from fvgen.system.files import writable_folder
from fvgen.system.places import sha256_of

VIDEO_FRAMES = 64  # taken of a video at most, evenly spaced: a clip of 16 frames with a stride of 4 needs as many


@dataclass(frozen=True)
class Source:
    """Where one scene comes from; ``name`` is its own among all."""

    name: str
    path: Path


class Opened(NamedTuple):
    """``format``: a key of `scenes.FORMATS`, or "photographs/colmap", "video/colmap", ... by who found the poses.
    ``left_out``: photographs without a pose, and why."""

    scene: Scene
    format: str
    left_out: dict[str, str]


# --- Finding ---


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """All scenes of the paths, under names that differ: NAME, PARENT/NAME where that is taken, else with a number.

    A path is a scene (`is_source`) or the parent of some. Raises UserError for one that is neither.
    """
    sources: list[Source] = []
    names: set[str] = set()
    for path in paths:
        for one in _below(Path(path)):
            full = one.resolve()
            name = full.name if full.name not in names else f"{full.parent.name}/{full.name}"
            copies = 2
            while name in names:
                name, copies = f"{full.parent.name}/{full.name}({copies})", copies + 1
            names.add(name)
            sources.append(Source(name, one))
    return sources


def the_scene_of(path: Path) -> Path:
    """A scene in a chunk, or the only one of a chunk. Raises UserError for a chunk of several."""
    if path.suffix != SUFFIX:
        return path
    scenes = chunk_scenes(path)
    if len(scenes) > 1:
        raise UserError(f"{path} holds {len(scenes)} scenes; give one of them, such as {scenes[0]}")
    return scenes[0]


def is_source(path: Path) -> bool:
    """A posed scene, a folder of photographs, a video file, or a chunk of scenes or one in it."""
    if path.is_file():
        return path.suffix.lower() in VIDEOS or path.suffix == SUFFIX
    if in_chunk(path):
        return True
    return path.is_dir() and (_is_scene(path) or holds_photographs(path))


def _is_scene(folder: Path) -> bool:
    return bool(scene_format(folder)) or (folder / "images").is_dir()


def _below(path: Path) -> list[Path]:
    """The path itself, or its scenes. Scenes below a folder count before photographs in it, which may be a preview."""
    if in_chunk(path):
        return chunk_scenes(path) if path.suffix == SUFFIX else [path]
    if path.is_file() and not is_source(path):
        raise UserError(f"{path} is a file but no video ({', '.join(VIDEOS)}); give a video or the folder of a scene")
    try:
        entries = [] if path.is_file() else sorted(path.iterdir())
    except OSError as error:
        state = "cannot be read; check its permissions" if path.exists() else "does not exist; check the path"
        raise UserError(f"data folder {path} {state}") from error
    if path.is_file() or _is_scene(path):
        return [path]
    sources = [entry for entry in entries if not entry.name.startswith(".") and is_source(entry)]
    if holds_photographs(path) and not any(entry.is_dir() and _is_scene(entry) for entry in sources):
        return [path]
    if not sources:
        raise UserError(
            f"data folder {path} {'holds no scene' if entries else 'is empty'}; give one with poses "
            "(transforms.json or sparse/0), photographs or videos, or the parent of such"
        )
    return [one for entry in sources for one in (_below(entry) if in_chunk(entry) else [entry])]


# --- Opening ---


def open_source(path: str | Path, points: str = "auto") -> Opened:
    """Read a scene, and pose it first where it is not: by DUSt3R for ``points`` = "dust3r", else as `pose_photographs`
    does on its own. Raises UserError for whatever is wrong with it, and where it cannot be posed."""
    path = Path(path)
    if in_chunk(path):
        path = scene_of_chunk(the_scene_of(path))
    if path.is_dir() and (scene_format(path) or not _has_photographs(path)):
        scene = read_scene(path)
        for note in scene.notes:
            _say(f"{path}: {note}")
        return Opened(scene, scene_format(path), {})
    return _opened(path if path.is_file() else read_photographs(path), points)


@cache
def _say(line: str) -> None:
    """Once in a process."""
    print(f"fvgen: {line}", file=sys.stderr)


def open_photographs(files: Sequence[str | Path], points: str = "auto") -> Opened:
    """The same of single photographs without poses."""
    paths = [Path(file) for file in files]
    names = Counter(path.name for path in paths)
    if twice := [name for name in names if names[name] > 1]:
        raise UserError(f"two of the photographs are called {twice[0]}; rename one of them")
    return _opened(photographs_of(paths, paths[0].resolve().parent.name or "photographs"), points)


def _opened(what: Path | Photographs, points: str) -> Opened:
    backend = "dust3r" if points == "dust3r" else "auto"
    posed = _posed(_digest(what, backend), what, backend)
    if isinstance(posed, UserError):
        raise posed
    scene = read_scene(posed)
    way = "dust3r" if scene.depth_paths else ("one view", "two views", "colmap")[min(len(scene), 3) - 1]
    left_out = read_json(posed / LEFT_OUT) if (posed / LEFT_OUT).exists() else {}
    return Opened(scene, f"{'video' if isinstance(what, Path) else 'photographs'}/{way}", left_out)


def _has_photographs(folder: Path) -> bool:
    return holds_photographs(folder) or (folder / "images").is_dir()


def _digest(what: Path | Photographs, backend: str) -> str:
    """Of all that decides the posed scene."""
    digest = hashlib.sha256(f"fvgen posed 2 {backend} {VIDEO_FRAMES}".encode())
    for file in [what] if isinstance(what, Path) else what.image_paths:
        digest.update(f"\0{file.name}\0{sha256_of(file)}".encode())
    return digest.hexdigest()[:32]


@lru_cache(maxsize=256)
def _posed(key: str, what: Path | Photographs, backend: str) -> Path | UserError:
    """The folder of the posed scene, or why there is none: a refusal costs minutes and is remembered."""
    place = writable_folder(cache_folder() / "posed" / key)
    name = what.resolve().name if isinstance(what, Path) else what.name
    folder = place / name  # the scene's name, in messages
    with FileLock(place / "lock"):  # of others who want the same scene, one makes it and the rest wait
        if folder.exists():
            return folder
        try:
            with tempfile.TemporaryDirectory() as frames:
                video = isinstance(what, Path)
                photographs = extract_video(what, Path(frames) / name, VIDEO_FRAMES, at_most=True) if video else what
                print(f"fvgen: posing {len(photographs)} photographs of {name}, minutes for many", file=sys.stderr)
                pose_photographs(photographs, folder, backend, in_order=video)
        except CannotWrite:
            raise
        except UserError as error:
            return error
    return folder
