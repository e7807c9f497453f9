"""What a stage learns from, by place and by contents: teacher, data and earlier stage, wherever they lie today.

A run is the same if its sources are, however their paths are typed, from whichever folder, and after all was copied or
moved. (Nothing here imports torch.)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fvgen.clips.worlds import is_builtin
from fvgen.errors import UserError
from fvgen.pipelines.presets import SHIPPED, model_folder
from fvgen.system.doors import problem, stream

SOURCES = ("teacher", "init", "data")
"""The settings that name one."""
PATTERNS = {
    "teacher": ("*.json", "*/*.json", "*/*.safetensors"),
    "init": ("student/*.json", "student/*/*.json", "student/*/*.safetensors", "head/*", "student_lora.safetensors"),
    "data": (
        "index.json",
        "clips.safetensors",
        "part-*-of-*.json",
    ),  # of a clip folder; of shards, with their checksums
}
WHOLE = 1 << 22
"""Bytes of a file that are read in full; of larger ones, weights, that many in `PIECES`."""
PIECES = 64


def is_path(key: str, name: str) -> bool:
    """Whether a source's name is a path: no preset, no word, no address."""
    if not name or "://" in name or (key == "data" and is_builtin(name)):
        return False
    return key != "teacher" or Path(name).exists() or not (SHIPPED / name).is_dir()


def located(words: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the sources' paths resolved."""
    return {**words, **{key: str(Path(words[key]).resolve()) for key in SOURCES if is_path(key, words[key])}}


def contents(words: Mapping[str, Any]) -> dict[str, str]:
    """Of every source with files here: twelve hex digits that change with their names, sizes and bytes (of large files,
    a sample of these)."""
    folders = {key: Path(words[key]) for key in SOURCES if is_path(key, words[key])}
    if "teacher" not in folders:
        folders["teacher"] = SHIPPED / words["teacher"]
    return {key: _digest(folder, PATTERNS[key]) for key, folder in folders.items() if folder.is_dir()}


def moved(words: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings that the run in ``folder`` was started with, with sources that are gone from their place where
    they are if all was moved together: as far from the run's folder as they were from its ``out``."""
    found = dict(words)
    for key in SOURCES:
        name = str(words.get(key, ""))
        if os.path.isabs(name) and os.path.isabs(str(words.get("out", ""))) and not Path(name).exists():
            candidate = Path(os.path.normpath(folder.resolve() / os.path.relpath(name, words["out"])))
            if candidate.is_dir():
                found[key] = str(candidate)
    return found


def check_source(key: str, name: str, before: str | None) -> None:
    """Raises UserError for a source that is not there; ``before``: what a run that is to go on had for it."""
    looked = Path(name).absolute()
    began = f", and this run began with {before}" if before and before not in (name, str(looked.resolve())) else ""
    if is_path(key, name) and not looked.exists() and (key != "teacher" or began):
        where = "" if str(looked) == name else f" (looked for {looked})"
        what = "data folder " if key == "data" else f"{key}="
        raise UserError(f"{what}{name} does not exist{where}{began}; give the place where it is now")
    if key == "teacher":
        model_folder(name)


def _digest(folder: Path, patterns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if problem(path) is None}):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size};".encode())
        with stream(path) as file:
            if size <= WHOLE:
                digest.update(file.read())
                continue
            for piece in range(PIECES):
                file.seek((size - WHOLE // PIECES) * piece // (PIECES - 1))
                digest.update(file.read(WHOLE // PIECES))
    return digest.hexdigest()[:12]
