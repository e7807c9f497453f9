"""Poses that phones and light-field scripts export beside photographs: Polycam's raw data (ARKit) and LLFF's table.

Sources: Polycam's "developer mode" raw export, whose ``t_RC`` are rows of ARKit's camera-to-world matrix (camera axes x
right, y up, z backwards, metres, y up in the world); LLFF (Mildenhall et al. 2019), ``poses_bounds.npy``: per image a
3x5 matrix, whose columns are the camera's down, right and backward axes, its position, and (height, width, focal
length), then the nearest and the farthest depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fvgen.errors import UserError, first_line, short
from fvgen.geometry.conventions import from_opengl
from fvgen.scenes.images import image_size
from fvgen.scenes.readers.photographs import PHOTOGRAPHS, is_picture
from fvgen.scenes.scene import IMAGE_FOLDERS, Frame, Scene, posed_scene
from fvgen.system.doors import open_array, read_object, regular

POLYCAM = (  # (folder of cameras, folder of images): those that Polycam has optimised, then ARKit's own
    ("keyframes/corrected_cameras", "keyframes/corrected_images"),
    ("keyframes/cameras", "keyframes/images"),
    ("cameras", "images"),
)
LLFF = "poses_bounds.npy"
ENTRIES = [[f"t_{row}{column}" for column in range(4)] for row in range(3)]


def polycam_folders(folder: Path) -> tuple[Path, Path] | None:
    """The folders of cameras and images of a Polycam export; None for anything else."""
    for cameras, images in POLYCAM:
        if (folder / images).is_dir() and any((folder / cameras).glob("*.json")):
            return folder / cameras, folder / images
    return None


def read_polycam(folder: Path, images: str | None = None) -> Scene:
    """Every camera file that has its photograph, in the order of their names (time stamps); metres."""
    if images is not None:
        raise UserError(f"{folder}: Polycam's exports have no {images}; leave out the choice of images")
    folders = polycam_folders(folder)
    if folders is None:
        raise UserError(f"{folder} has no keyframes/cameras and keyframes/images; give a Polycam raw export")
    cameras, place = folders
    stored = {path.stem: path for path in sorted(place.iterdir()) if is_picture(path)}
    files = sorted(cameras.glob("*.json"))
    frames = [_polycam_frame(file, read_object(file), stored[file.stem]) for file in files if file.stem in stored]
    if not frames:
        raise UserError(f"none of the {len(files)} cameras of {cameras} has a photograph of its name in {place}")
    notes = []
    if without := len(files) - len(frames):
        notes.append(f"{without} cameras of {cameras.name} have no photograph of their name and are left out")
    if alone := len(stored.keys() - {file.stem for file in files}):
        notes.append(f"{alone} photographs of {place.name} have no camera of their name and are left out")
    if (folder / "keyframes" / "depth").is_dir():
        notes.append("the depth maps of keyframes/depth are smaller than the photographs and are not used")
    return replace(posed_scene(folder, frames), notes=tuple(notes))


def _polycam_frame(file: Path, values: Mapping[str, Any], image: Path) -> Frame:
    rows = [[_number(file, values, key) for key in row] for row in ENTRIES]
    width, height = image_size(image)
    size = (_number(file, values, "width", width), _number(file, values, "height", height))
    focal, center = ((_number(file, values, x), _number(file, values, y)) for x, y in (("fx", "fy"), ("cx", "cy")))
    pose = from_opengl(torch.tensor([*rows, [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64))
    return Frame(str(file), image, size, focal, center, pose)


def _number(file: Path, values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{file}: {key} is {short(value)}, no finite number; export the scan again")
    return float(value)


def read_llff(folder: Path, images: str | None = None) -> Scene:
    """The photographs of ``images`` (or images_2, images_4, images_8) in the order of their names, a row of the table
    each."""
    file = regular(folder / LLFF, "make it with LLFF's imgs2poses")
    try:
        table = np.asarray(open_array(file), dtype=np.float64)
    except (ValueError, OSError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); make it again with LLFF's imgs2poses") from error
    if table.ndim != 2 or table.shape[1] != 17 or not np.isfinite(table).all():
        raise UserError(f"{file} is no table of 17 finite numbers a photograph; make it again with LLFF's imgs2poses")
    if images is not None and images not in IMAGE_FOLDERS:
        raise UserError(f"unknown image folder {images!r}; choose one of {', '.join(IMAGE_FOLDERS)}")
    found = {name: _pictures(folder / name) for name in ([images] if images else IMAGE_FOLDERS)}
    chosen = next((name for name, files in found.items() if files), images or "images")
    files = found.get(chosen, [])
    if len(files) != len(table):
        raise UserError(
            f"{file} has {len(table)} rows and {folder / chosen} {len(files)} photographs "
            f"({', '.join(PHOTOGRAPHS[:3])}, ...), which belong together by their order; bring those that belong to it"
        )
    frames = []
    for row, (numbers, image) in enumerate(zip(table, files, strict=True)):
        matrix = torch.from_numpy(numbers[:15].reshape(3, 5).copy())
        height, width, focal = matrix[:, 4].tolist()
        pose = torch.eye(4, dtype=torch.float64)
        down, right, backward, position = matrix[:, :4].T
        pose[:3] = torch.stack([right, down, -backward, position], dim=1)
        size, middle = (width, height), (width / 2, height / 2)
        where = f"{file} row {row} ({image.name})"
        frames.append(Frame(where, image, size, (focal, focal), middle, pose, factor=IMAGE_FOLDERS[chosen]))
    note = f"the nearest and farthest depths in {LLFF} are not used"
    return replace(posed_scene(folder, frames), notes=(note,))


def _pictures(folder: Path) -> list[Path]:
    return sorted(filter(is_picture, folder.iterdir())) if folder.is_dir() else []
