"""RealEstate10K and ACID as pixelSplat shares them: `.torch` chunks of some hundred MB that hold many scenes each.

A chunk is a list of dictionaries: ``key``, ``url``, ``timestamps`` [F], ``cameras`` [F, 18] (focal lengths and
principal point in fractions of the size, two zeros, the 3x4 world-to-camera matrix row by row: a line of the data set's
own camera files) and ``images``, F byte tensors that are JPEG files. Source: pixelSplat (Charatan et al. 2024),
src/scripts/convert_re10k.py of its repository. Nothing in a chunk is executed: tensors and plain containers alone load.

``CHUNK.torch/KEY`` names a scene. It is written out as the data set itself is (camera file and frames) in fvgen's
cache when it is first opened; `fvgen.scenes.readers.realestate10k` then reads and judges it as any other.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fvgen.clips.builtin import cache_folder
from fvgen.errors import UserError, short
from fvgen.system.doors import other_kind, read_state, regular
from fvgen.system.files import atomic_path, new_folder, write_bytes, write_text

SUFFIX = ".torch"
NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
MOST_IMAGE = 1 << 26  # bytes
CURE = "copy the chunk again"


def in_chunk(path: str | Path) -> bool:
    """Whether a path names a chunk, or a scene in one."""
    path = Path(path)
    return (path.suffix == SUFFIX and path.is_file()) or (path.parent.suffix == SUFFIX and path.parent.is_file())


def chunk_scenes(chunk: Path) -> list[Path]:
    """The scenes of a chunk, as paths below it. Raises UserError for a file that is none."""
    return [chunk / key for key in _read(chunk)]


def scene_of_chunk(path: Path) -> Path:
    """The folder of a scene in a chunk, written now or before. Raises UserError for damage, and for no such scene."""
    scenes = _read(path.parent)
    if path.name not in scenes:
        raise UserError(f"{path.parent} holds no scene {short(path.name)}; it has {', '.join(list(scenes)[:3])}, ...")
    files = _files(path, scenes[path.name])
    digest = hashlib.sha256(b"\0".join(name.encode() + data for name, data in files.items())).hexdigest()[:32]
    folder = cache_folder() / "chunks" / digest / path.name
    if not folder.exists():
        with atomic_path(folder) as temporary:
            new_folder(temporary)
            for name, data in files.items():
                if name.endswith(".txt"):
                    write_text(temporary / name, data.decode())
                else:
                    write_bytes(temporary / name, data)
    return folder


def _read(chunk: Path) -> dict[str, dict[str, Any]]:
    """key -> what the chunk holds of it; the tensors are views of the file."""
    return _kept(chunk, regular(chunk, CURE).stat().st_mtime_ns)


@lru_cache(maxsize=1)  # the scenes of a chunk are asked for one after the other
def _kept(chunk: Path, changed: int) -> dict[str, dict[str, Any]]:
    if other := other_kind(chunk):
        raise UserError(f"{chunk} {other}")
    listed = read_state(chunk, CURE)
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{chunk} is no chunk of scenes (a list of them, as pixelSplat writes it); {CURE}")
    scenes: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(listed):
        key = entry.get("key") if isinstance(entry, dict) else None
        if not isinstance(key, str) or not NAME.fullmatch(key):
            raise UserError(f"{chunk}: scene {number} has the key {short(key)}, which is no name; {CURE}")
        if key in scenes:
            raise UserError(f"{chunk} holds the scene {key} twice; {CURE}")
        scenes[key] = entry
    return scenes


def _files(path: Path, entry: dict[str, Any]) -> dict[str, bytes]:
    """The camera file and the frames of a scene. Raises UserError for what does not fit."""
    cameras, stamps, images = (entry.get(name) for name in ("cameras", "timestamps", "images"))
    if not isinstance(cameras, torch.Tensor) or cameras.ndim != 2 or cameras.shape[1] != 18 or not len(cameras):
        raise UserError(f"{path}: cameras are no table of 18 numbers a frame; {CURE}")
    if not isinstance(stamps, torch.Tensor) or stamps.shape != (len(cameras),) or stamps.is_floating_point():
        raise UserError(f"{path}: timestamps are no {len(cameras)} whole numbers, one a camera; {CURE}")
    if not isinstance(images, list) or len(images) != len(cameras):
        raise UserError(f"{path}: images are no list of {len(cameras)} files, one a camera; {CURE}")
    for number, image in enumerate(images):
        bytes_alone = isinstance(image, torch.Tensor) and image.dtype is torch.uint8 and image.ndim == 1
        if not bytes_alone or not 0 < image.numel() <= MOST_IMAGE:
            raise UserError(f"{path}: image {number} is no file's bytes; {CURE}")
    rows = zip(stamps.tolist(), cameras.double().tolist(), strict=True)
    lines = [f"{stamp} {' '.join(map(repr, row))}" for stamp, row in rows]
    url = entry.get("url")
    text = "\n".join([url if isinstance(url, str) and url.isprintable() else "-", *lines]) + "\n"
    frames = {f"{stamp}.jpg": image.numpy().tobytes() for stamp, image in zip(stamps.tolist(), images, strict=True)}
    return {f"{path.name}.txt": text.encode(), **frames}
