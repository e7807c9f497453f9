"""COLMAP's sparse models: cameras, images and points3D, binary or text, as plain records.

Layouts: COLMAP documentation, "Output Format". The files are parsed here and not by pycolmap, whose reader
(4.2) can run on for minutes over a damaged ``points3D.bin`` and takes a ``cameras.bin`` that is cut short for
a whole one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.conventions import quaternion_to_rotation
from fvgen.system.doors import Unreadable, read_bytes

MODELS = (  # by number: name and count of parameters
    ("SIMPLE_PINHOLE", 3),
    ("PINHOLE", 4),
    ("SIMPLE_RADIAL", 4),
    ("RADIAL", 5),
    ("OPENCV", 8),
    ("OPENCV_FISHEYE", 8),
    ("FULL_OPENCV", 12),
    ("FOV", 5),
    ("SIMPLE_RADIAL_FISHEYE", 4),
    ("RADIAL_FISHEYE", 5),
    ("THIN_PRISM_FISHEYE", 12),
)


class Camera(NamedTuple):
    """Intrinsics in pixels; ``params`` as the model orders them."""

    number: int
    model: str
    width: int
    height: int
    params: tuple[float, ...]


class Shot(NamedTuple):
    """A registered image: cam_from_world as a quaternion (w, x, y, z) and a translation."""

    number: int
    rotation: tuple[float, ...]
    translation: tuple[float, ...]
    camera: int
    name: str


class Point(NamedTuple):
    """A triangulated point: position, RGB (0..255) and the numbers of the images that it was found in."""

    position: tuple[float, ...]
    color: tuple[int, ...]
    seen_in: tuple[int, ...]


def model_folder(folder: Path) -> Path | None:
    """Where the sparse model of a scene's folder is: the largest of ``sparse/0``, ``sparse/1``, ... by its images, else
    ``sparse``, else the same below ``colmap`` (nerfstudio's own layout); None if there is none."""
    for parent in (folder / "sparse", folder / "colmap" / "sparse"):
        if models := [place for place in _numbered(parent) if _has(place, "cameras")]:
            return max(models, key=lambda place: _size(place, "images"))
        if _has(parent, "cameras"):
            return parent
    return None


def other_models(model: Path) -> list[str]:
    """Names of the models beside this one, which nobody reads."""
    beside = _numbered(model.parent) if model.name.isdecimal() else []
    return [place.name for place in beside if place != model and _has(place, "cameras")]


def _numbered(parent: Path) -> list[Path]:
    try:
        return sorted((x for x in parent.iterdir() if x.name.isdecimal()), key=lambda x: int(x.name))
    except OSError:
        return []


def _has(place: Path, stem: str) -> bool:
    return any((place / f"{stem}{suffix}").exists() for suffix in FILES[stem])


def _size(place: Path, stem: str) -> int:
    """Bytes of the file that is read; COLMAP numbers its models by when it made them, not by size."""
    return next((file.stat().st_size for x in FILES[stem] if (file := place / f"{stem}{x}").exists()), 0)


def read_cameras(model: Path) -> list[Camera]:
    """All cameras of a model folder. This and the next two raise UserError on missing or damaged files."""
    return _records(model, "cameras")


def read_shots(model: Path) -> list[Shot]:
    """All registered images, sorted by name."""
    return sorted(_records(model, "images"), key=lambda shot: shot.name)


def read_points(model: Path) -> list[Point]:
    """All points; [] where the model has no points3D file."""
    return _records(model, "points3D", optional=True)


def world_from_cam(shot: Shot) -> Tensor:
    """[4, 4] float64, OpenCV axes. A quaternion far off unit length (damage, not rounding) gives no rotation,
    for `pose_problem` to find."""
    quaternion = torch.tensor(shot.rotation, dtype=torch.float64)
    length = quaternion.norm()
    cam_from_world = quaternion_to_rotation(quaternion / length if abs(length - 1) < 0.01 else quaternion)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = cam_from_world.T
    pose[:3, 3] = -cam_from_world.T @ torch.tensor(shot.translation, dtype=torch.float64)
    return pose


class _Bytes:
    """Little-endian values, one after the other; ValueError where the data end too early or too late."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple:
        start = self.at
        self.skip(struct.calcsize("<" + layout))
        return struct.unpack_from("<" + layout, self.data, start)

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise ValueError("it ends too early")

    def records(self) -> Iterator[None]:
        """Once per record, as many as the leading count says; nothing may be left after the last."""
        for _ in range(*self.take("Q")):
            yield
        if self.at != len(self.data):
            raise ValueError("it goes on after its last record")

    def name(self) -> str:
        end = self.data.index(b"\0", self.at)
        text, self.at = os.fsdecode(self.data[self.at : end]), end + 1
        return text


def _binary_cameras(data: bytes) -> Iterator[Camera]:
    source = _Bytes(data)
    for _ in source.records():
        number, model, width, height = source.take("IiQQ")
        if not 0 <= model < len(MODELS):
            raise ValueError(f"unknown camera model {model}")
        name, count = MODELS[model]
        yield Camera(number, name, width, height, source.take(f"{count}d"))


def _binary_images(data: bytes) -> Iterator[Shot]:
    source = _Bytes(data)
    for _ in source.records():
        number, *pose, camera = source.take("I7dI")
        yield Shot(number, tuple(pose[:4]), tuple(pose[4:]), camera, source.name())
        (keypoints,) = source.take("Q")
        source.skip(24 * keypoints)  # x, y, number of the point


def _binary_points(data: bytes) -> Iterator[Point]:
    source = _Bytes(data)
    for _ in source.records():
        values = source.take("Q3d3BdQ")  # number, position, colour, error, length of the track
        yield Point(values[1:4], values[4:7], source.take(f"{2 * values[8]}I")[::2])


def _text_lines(data: bytes) -> Iterator[str]:
    text = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).replace("\r\n", "\n")
    return (line for line in text.split("\n") if not line.startswith("#"))


def _text_cameras(data: bytes) -> Iterator[Camera]:
    for fields in filter(None, map(str.split, _text_lines(data))):
        number, model, width, height, *params = fields
        yield Camera(int(number), model, int(width), int(height), tuple(map(float, params)))


def _text_images(data: bytes) -> Iterator[Shot]:
    lines = _text_lines(data)
    for line in filter(str.strip, lines):
        number, qw, qx, qy, qz, tx, ty, tz, camera, name = line.split(maxsplit=9)
        rotation = (float(qw), float(qx), float(qy), float(qz))
        yield Shot(int(number), rotation, (float(tx), float(ty), float(tz)), int(camera), name.strip())
        points = next(lines, "").split()  # the keypoints: one more line, which may be empty
        if len(points) == 10 and not _is_number(points[9]):
            raise UserError(
                f"images.txt: the line after image {name.strip()!r} is an image where key points belong; leave an "
                "empty line after each image"
            )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _text_points(data: bytes) -> Iterator[Point]:
    for fields in filter(None, map(str.split, _text_lines(data))):
        _, x, y, z, red, green, blue, _, *track = fields
        position = (float(x), float(y), float(z))
        yield Point(position, (int(red), int(green), int(blue)), tuple(map(int, track[::2])))


FILES: dict[str, dict[str, Callable[[bytes], Iterator]]] = {
    "cameras": {".bin": _binary_cameras, ".txt": _text_cameras},
    "images": {".bin": _binary_images, ".txt": _text_images},
    "points3D": {".bin": _binary_points, ".txt": _text_points},
}


def _records(model: Path, stem: str, optional: bool = False) -> list:
    for suffix, parse in FILES[stem].items():
        file = model / (stem + suffix)
        if not file.exists():
            continue
        try:
            return list(parse(read_bytes(file)))
        except Unreadable as error:
            raise UserError(f"{file} cannot be read ({error.reason}); check its permissions") from error
        except UserError as error:
            raise UserError(f"{model / str(error)}") from error
        except (struct.error, ValueError) as error:
            raise UserError(f"{file} is cut short or damaged ({error}); copy it again or run COLMAP again") from error
    if optional:
        return []
    raise UserError(f"{model} has no {stem}.bin or {stem}.txt; copy the whole model or run COLMAP again")
