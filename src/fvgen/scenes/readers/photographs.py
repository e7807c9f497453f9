"""Photographs without poses: plain folders, and single video files. Posing them is a point-map backend's work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fvgen.errors import UserError, first_line
from fvgen.scenes.images import HEIC, image_size, is_plain, load_image
from fvgen.scenes.transfer import FROM_LIGHT, standard_range
from fvgen.system.doors import open_video, problem, there
from fvgen.system.files import atomic_path, new_folder
from fvgen.system.packages import install
from fvgen.system.places import sha256_of

PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", *HEIC)
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
MOST_FRAMES = 200_000  # of a video: nearly two hours; a few MB of a still picture can stand for a year
WIDEST = 8.0  # a pixel's width over its height
SMALLEST = 16  # pixels on the short side: below it nothing can be matched


@dataclass(frozen=True)
class Photographs:
    """V photographs of one size, in the order of their names. ``duplicates``: left out, the same bytes as another."""

    name: str
    image_paths: tuple[Path, ...]
    height: int
    width: int
    duplicates: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.image_paths)


def holds_photographs(folder: Path) -> bool:
    """Whether photographs are right in this folder; not in one that cannot be read."""
    try:
        return any(is_picture(path) for path in folder.iterdir())
    except OSError:
        return False


def is_picture(path: Path) -> bool:
    """Hidden files are none: some systems leave a ._NAME.jpg beside each NAME.jpg. Nor are instant-ngp's masks."""
    return path.suffix.lower() in PHOTOGRAPHS and not path.name.startswith((".", "dynamic_mask_"))


def read_photographs(folder: str | Path) -> Photographs:
    """All photographs of a folder (or its sub-folder ``images``), numbers in their names in numerical order.

    Pixels are not decoded yet. Raises UserError for a folder without photographs, for sizes that differ, and for images
    that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        state = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {state}; give a folder of photographs")
    place = folder / "images" if (folder / "images").is_dir() else folder
    files = sorted(filter(is_picture, place.iterdir()), key=_natural)
    if not files:
        raise UserError(f"{place} holds no photographs ({', '.join(PHOTOGRAPHS)}); copy them there")
    return photographs_of(files, folder.resolve().name or "photographs")


def photographs_of(files: Sequence[Path], name: str) -> Photographs:
    """The given files, in this order; checked as in `read_photographs`."""
    first = image_size(files[0], posed=False)
    kept, duplicates = {}, []
    for file in files:
        size = image_size(file, posed=False)
        if size != first:
            raise UserError(
                f"image {file} is {size[0]}x{size[1]}, {files[0].name} is {first[0]}x{first[1]}; all photographs of a "
                "scene must have one size, so crop or resize them, or take out those of another camera"
            )
        digest = sha256_of(file)
        if digest in kept:
            duplicates.append(file)
        else:
            kept[digest] = file
    if min(first) < SMALLEST:
        raise UserError(f"image {files[0]} is {first[0]}x{first[1]}, too small to work with; give larger photographs")
    return Photographs(name, tuple(kept.values()), first[1], first[0], tuple(duplicates))


def copy_photograph(path: Path, folder: Path) -> Path:
    """The photograph in ``folder``: the same file where all programs see the same pixels in it, else a PNG of them."""
    if is_plain(path):
        return Path(shutil.copyfile(path, folder / path.name))
    copy = folder / f"{path.name}.png"
    Image.fromarray(load_image(path)).save(copy, compress_level=1)
    return copy


def extract_video(file: str | Path, folder: str | Path, frames: int, at_most: bool = False) -> Photographs:
    """``frames`` frames of a video, evenly spaced from its first to its last, as PNG files in ``folder``, upright.

    With ``at_most`` a shorter video will do. The folder appears when all is written, or not at all; one that is there
    already must not be. Needs PyAV (the extra `photos`). Raises UserError for a file that is no video, damaged
    or too short.
    """
    file, folder = Path(file), Path(folder)
    if reason := problem(file):
        state = "does not exist" if not there(file) else f"cannot be read ({reason})"
        raise UserError(f"video {file} {state}; check the path")
    if folder.exists():
        raise UserError(f"{folder} is already there; choose another folder for the frames of {file.name}")
    if frames < 1:
        raise UserError(f"{frames} frames cannot be taken from {file}; ask for one or more")
    total = sum(1 for _ in video_frames(file))
    if total and at_most:
        frames = min(frames, total)
    if total < frames:
        raise UserError(f"video {file} has {total} frames, not {frames}; ask for fewer")
    wanted = {round(place) for place in np.linspace(0, total - 1, frames)}
    with atomic_path(folder) as temporary:
        new_folder(temporary)
        for number, pixels in enumerate(video_frames(file)):
            if number in wanted:
                Image.fromarray(pixels()).save(temporary / f"{number:06d}.png", compress_level=1)
    return read_photographs(folder)


def video_frames(file: Path) -> Iterator[Callable[[], np.ndarray]]:
    """A function for each frame that gives its pixels, uint8 [H, W, 3]: converting them takes longer than decoding."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"reading the video {file} needs PyAV; `{install('photos')}`, or give a folder of its frames"
        ) from error

    def upright(frame: av.VideoFrame) -> np.ndarray:
        # Phones store the sensor's image and the angle, counter-clockwise, that turns it upright.
        return np.ascontiguousarray(np.rot90(pixels(frame), round(frame.rotation / 90)))

    def pixels(frame: av.VideoFrame) -> np.ndarray:
        curve, width = int(frame.color_trc), frame.width
        if shape := container.streams.video[0].sample_aspect_ratio:  # pixels that are not square, of old cameras
            if not 1 / WIDEST <= shape <= WIDEST:
                raise UserError(f"video {file} has pixels {float(shape):g} times as wide as high; convert it")
            width = max(1, round(frame.width * shape))
        if curve not in FROM_LIGHT:
            return frame.to_ndarray(format="rgb24", width=width)
        coded = frame.to_ndarray(format="rgb48le", width=width).astype(np.float32) / 65535
        return standard_range(coded, FROM_LIGHT[curve])

    try:
        with open_video(file) as container:
            if not container.streams.video:
                raise UserError(f"{file} holds no video; give a video file or a folder of photographs")
            for number, frame in enumerate(container.decode(video=0)):
                if number == MOST_FRAMES:
                    raise UserError(f"video {file} has more than {MOST_FRAMES} frames; cut it to what you need")
                yield lambda frame=frame: upright(frame)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"video {file} cannot be decoded ({first_line(error)}); copy it again or convert it") from error


def _natural(path: Path) -> list:
    """2.jpg before 10.jpg."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]
