"""Posed photographs of a static scene, in any of the formats that we know, read into one `Scene`.

A format is a row of `FORMATS`: how to tell it, and a function from a folder to a `Scene`. Whatever can be wrong with a
folder is found by `read_scene`, before any work starts, and said in one sentence; only damaged pixels wait for
`Scene.image`. docs/data.md says how each is laid out and where to get it. Photographs without poses get them in
`fvgen.posing.sources`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fvgen.errors import UserError, did_you_mean
from fvgen.scenes import colmap_files
from fvgen.scenes.images import load_depth, load_image
from fvgen.scenes.readers.colmap import read_colmap
from fvgen.scenes.readers.nerfstudio import read_dl3dv, read_nerfstudio, read_splits
from fvgen.scenes.readers.phones import LLFF, polycam_folders, read_llff, read_polycam
from fvgen.scenes.readers.realestate10k import camera_file, read_realestate10k
from fvgen.scenes.scene import Scene

__all__ = ["FORMATS", "Format", "Scene", "find_scenes", "load_depth", "load_image", "read_scene"]


class Format(NamedTuple):
    """``detects`` looks for the files that tell a format; ``read`` takes the folder and the choice of images_N."""

    detects: Callable[[Path], bool]
    read: Callable[[Path, str | None], Scene]


FORMATS: dict[str, Format] = {  # the first that detects its files is meant
    "nerfstudio": Format(lambda folder: (folder / "transforms.json").exists(), read_nerfstudio),
    "dl3dv": Format(lambda folder: (folder / "nerfstudio" / "transforms.json").exists(), read_dl3dv),
    "synthetic": Format(lambda folder: (folder / "transforms_train.json").exists(), read_splits),
    "colmap": Format(lambda folder: colmap_files.model_folder(folder) is not None, read_colmap),
    "polycam": Format(lambda folder: polycam_folders(folder) is not None, read_polycam),
    "llff": Format(lambda folder: (folder / LLFF).exists(), read_llff),
    "realestate10k": Format(lambda folder: camera_file(folder) is not None, read_realestate10k),
}


def find_scenes(folder: str | Path) -> list[Path]:
    """The folder itself if it is a scene, else those of its sub-folders that are, sorted by name.

    A folder with ``images`` but without poses counts, so that `read_scene` can say what it lacks.
    Raises UserError when there is none.
    """
    folder = _existing(folder)
    if _looks_like_scene(folder):
        return [folder]
    entries = sorted(folder.iterdir())
    scenes = [entry for entry in entries if entry.is_dir() and _looks_like_scene(entry)]
    if not scenes:
        state = "holds no scene" if entries else "is empty"
        raise UserError(
            f"data folder {folder} {state}; give one with transforms.json or sparse/0, or the parent of such"
        )
    return scenes


def read_scene(folder: str | Path, format: str = "auto", images: str | None = None) -> Scene:
    """Read and check a scene; ``format`` is a key of `FORMATS`, or "auto": the first whose files are there.

    ``images`` chooses among images, images_2, images_4 and images_8 where a format has them; None is the first that is
    there. Raises UserError (what, which file and frame, what to do) for anything wrong with the folder.
    """
    folder = _existing(folder)
    if format == "auto":
        format = scene_format(folder)
        if not format:
            raise UserError(
                f"{folder} has no camera poses (no transforms.json, no sparse/0/cameras.bin or .txt, no camera file "
                f"{folder.resolve().name}.txt); run COLMAP on its images (`fvgen prepare` does) or give another folder"
            )
    if format not in FORMATS:
        raise UserError(f"unknown scene format {format!r}{did_you_mean(format, [*FORMATS, 'auto'])}")
    return FORMATS[format].read(folder, images)


def scene_format(folder: Path) -> str:
    """The key of `FORMATS` that "auto" means for this folder; "" for none."""
    return next((name for name, row in FORMATS.items() if row.detects(folder)), "")


def _looks_like_scene(folder: Path) -> bool:
    return bool(scene_format(folder)) or (folder / "images").is_dir()


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data folder {folder} {what}; give the folder that holds the scene")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"data folder {folder} cannot be read; check its permissions")
    return folder
