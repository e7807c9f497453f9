"""Posed photographs of a static scene: nerfstudio and COLMAP folders, read into one `Scene`.

A format is a row of `FORMATS`: a function from a folder to a `Scene`. Whatever can be wrong with a folder is
found by `read_scene`, before any work starts, and said in one sentence; only damaged pixels wait for
`load_image`.

Conventions: nerfstudio documentation, "Data conventions"; COLMAP documentation, "Output Format". Both put the
centre of the top-left pixel at (0.5, 0.5), as we do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fvgen.data import colmap
from fvgen.errors import UserError, did_you_mean
from fvgen.geometry.cameras import Cameras, pose_problem
from fvgen.geometry.conventions import from_opengl

SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG", ".webp")
PERSPECTIVE = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL")  # pinholes when undistorted
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
UNDISTORT = "undistort the images first, for example with `colmap image_undistorter`"
# Largest difference of two poses that are meant to be one: per entry of the rotation, and per scene extent.
SAME_WORLD = 1e-3
# Cameras farther from the origin (scene units) would lose more than 0.06 units to 32-bit rounding.
FARTHEST = 1e6
# Plausible focal lengths in image sizes: others are usually fractions or millimetres by mistake.
FOCALS = (0.05, 100.0)
EXIF_ORIENTATION = 0x0112
# What a file holds may be of any length; an error message is one sentence.
SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 100
short = SHORT.repr


class Cloud(NamedTuple):
    """The three point fields of a `Scene`."""

    points: Tensor | None = None
    point_colors: Tensor | None = None
    observations: Tensor | None = None


@dataclass(frozen=True)
class Scene:
    """V posed photographs of one size, and what is known of the geometry.

    points: [N, 3] in the world, or None.
    point_colors: [N, 3] in [0, 1]. COLMAP averages a point's colour over all photographs that show it, also
        held-out ones; an honest evaluation takes colours from known photographs only: `photos.scene_cloud`.
    observations: [M, 2] int64, rows (point, view): the views in which a point was found.
    depth_paths: one map per view, of the image's size, camera z in ``depth_unit`` scene units; or None.
    """

    name: str
    image_paths: tuple[Path, ...]
    cameras: Cameras
    points: Tensor | None = None
    point_colors: Tensor | None = None
    observations: Tensor | None = None
    depth_paths: tuple[Path, ...] | None = None
    depth_unit: float = 0.001

    def __len__(self) -> int:
        return len(self.image_paths)

    def seen_by(self, view: int) -> Tensor:
        """[N] bool: the points that were found in this view."""
        assert self.points is not None and self.observations is not None
        seen = torch.zeros(self.points.shape[0], dtype=torch.bool)
        seen[self.observations[self.observations[:, 1] == view, 0]] = True
        return seen


class Frame(NamedTuple):
    """One view as its format tells it; ``where`` opens error messages about it."""

    where: str
    image: Path
    size: tuple[float, float]  # width, height, as the format says
    focal: tuple[float, float]
    center: tuple[float, float]
    pose: Tensor  # [4, 4] float64 camera-to-world, OpenCV axes
    depth: Path | None = None


def find_scenes(folder: str | Path) -> list[Path]:
    """The folder itself if it is a scene, else those of its sub-folders that are, sorted by name.

    A folder with ``images`` but without poses counts, so that `read_scene` can say what it lacks.
    Raises UserError when there is none.
    """
    folder = _existing(folder)
    if _looks_like_scene(folder):
        return [folder]
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"data folder {folder} cannot be read ({error.strerror}); check its permissions") from error
    scenes = [entry for entry in entries if entry.is_dir() and _looks_like_scene(entry)]
    if not scenes:
        state = "holds no scene" if entries else "is empty"
        raise UserError(
            f"data folder {folder} {state}; give one with transforms.json or sparse/0, or the parent of such"
        )
    return scenes


def read_scene(folder: str | Path, format: str = "auto") -> Scene:
    """Read and check a scene; ``format`` is a key of `FORMATS`, or "auto": the first whose files are there.

    Raises UserError (what, which file and frame, what to do) for anything wrong with the folder.
    """
    folder = _existing(folder)
    if format == "auto":
        if not _is_nerfstudio(folder) and not colmap.model_folder(folder):
            raise UserError(
                f"{folder} has no camera poses (no transforms.json, no sparse/0/cameras.bin or .txt); "
                "run COLMAP on its images or give another folder"
            )
        format = "nerfstudio" if _is_nerfstudio(folder) else "colmap"
    if format not in FORMATS:
        raise UserError(f"unknown scene format {format!r}{did_you_mean(format, [*FORMATS, 'auto'])}")
    return FORMATS[format](folder)


def read_nerfstudio(folder: Path) -> Scene:
    """``transforms.json``: OpenGL camera-to-world, intrinsics for all frames or each, optional depth maps.

    Points of a COLMAP model in the same folder are attached if its poses agree with those of transforms.json.
    """
    file = folder / "transforms.json"
    try:
        document = json.loads(_read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no valid JSON ({error}); correct it or export the poses again") from error
    listed = document.get("frames") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{file} has no list of frames, so the scene has no poses; export the poses again")
    frames = [_nerfstudio_frame(folder, f"{file} frame {i}", document, frame) for i, frame in enumerate(listed)]
    unit = _number(document, "depth_unit_scale_factor", str(file), positive=True) or 0.001
    views, depths = _checked(folder, frames), _depths(frames)
    return Scene(*views, *_cloud_of_same_world(folder, frames), depth_paths=depths, depth_unit=unit)


def _nerfstudio_frame(folder: Path, where: str, document: dict, frame: object) -> Frame:
    if not isinstance(frame, dict) or not isinstance(name := frame.get("file_path"), str) or not name:
        raise UserError(f"{where} has no file_path; export the poses again")
    where = f"{where} ({short(name)})"
    values = {**document, **frame}
    model = values.get("camera_model", "PINHOLE")
    if model not in PERSPECTIVE or values.get("is_fisheye"):
        raise UserError(f"{where}: the camera model {short(model)} is not perspective; {UNDISTORT}")
    if bent := [key for key in DISTORTION if _number(values, key, where)]:
        raise UserError(f"{where}: lens distortion {bent[0]} is not zero, only pinhole cameras are read; {UNDISTORT}")

    image = next((path for suffix in SUFFIXES if os.path.isfile(path := folder / (name + suffix))), None)
    if image is None:
        raise UserError(f"{where}: the image is missing in {folder}; put it there or remove the frame")
    width, height = _image_size(image)
    size = (
        _number(values, "w", where, positive=True) or width,
        _number(values, "h", where, positive=True) or height,
    )
    focal_x = _number(values, "fl_x", where, positive=True) or _focal(values, "camera_angle_x", width, where)
    focal_y = _number(values, "fl_y", where, positive=True) or _focal(values, "camera_angle_y", height, where)
    if focal_x is None:
        raise UserError(f"{where}: there is neither fl_x nor camera_angle_x; add the focal length in pixels")
    x, y = _number(values, "cx", where), _number(values, "cy", where)
    center = (width / 2 if x is None else x, height / 2 if y is None else y)

    depth = frame.get("depth_file_path")
    if depth is not None and not isinstance(depth, str):
        raise UserError(f"{where}: depth_file_path is {short(depth)}; give the path of a 16-bit image or remove it")
    pose = from_opengl(_matrix(frame.get("transform_matrix"), where))
    return Frame(where, image, size, (focal_x, focal_y or focal_x), center, pose, folder / depth if depth else None)


def _number(values: dict, key: str, where: str, positive: bool = False) -> float | None:
    """A finite number, or None where the key is absent."""
    value = values.get(key)
    if value is None:
        return None
    if not _is_number(value) or (positive and value <= 0):
        kind = "positive" if positive else "finite"
        raise UserError(f"{where}: {key} is {short(value)}, not a {kind} number; correct it or export the poses again")
    return float(value)


def _is_number(value: object) -> bool:
    """Neither text, bool, NaN nor of absurd size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _focal(values: dict, key: str, size: int, where: str) -> float | None:
    angle = _number(values, key, where, positive=True)
    if angle is None:
        return None
    if angle >= math.pi:
        raise UserError(f"{where}: {key} is {angle}; give the field of view in radians, less than pi")
    return size / 2 / math.tan(angle / 2)


def _matrix(rows: object, where: str) -> Tensor:
    """[4, 4] float64 from nested lists of 4x4 or 3x4 numbers."""
    if not isinstance(rows, list) or len(rows) not in (3, 4):
        raise UserError(f"{where}: transform_matrix is missing or not 4x4; export the poses again")
    for row in rows:
        if not isinstance(row, list) or len(row) != 4:
            raise UserError(
                f"{where}: row {short(row)} of transform_matrix is not four numbers; export the poses again"
            )
        if wrong := [value for value in row if not _is_number(value)]:
            raise UserError(
                f"{where}: transform_matrix holds {short(wrong[0])}, not a finite number; "
                "correct it or remove the frame"
            )
    return torch.tensor([*rows, [0, 0, 0, 1]][:4], dtype=torch.float64)


def _depths(frames: list[Frame]) -> tuple[Path, ...] | None:
    """The depth map of every frame, sizes checked; None when no frame has one."""
    if all(frame.depth is None for frame in frames):
        return None
    for frame in frames:
        if frame.depth is None:
            raise UserError(f"{frame.where} has no depth_file_path but others have; add it, or remove it everywhere")
        if _image_size(frame.depth) != frame.size:
            raise UserError(f"depth map {frame.depth} has another size than its image; resize it (nearest) to match")
    return tuple(frame.depth for frame in frames)


def read_colmap(folder: Path) -> Scene:
    """A model in ``sparse/0`` or ``sparse``, .bin or .txt; photographs in ``images``; views sorted by name.

    Only pinhole models are read. COLMAP 4's rigs and frames repeat what its images hold, and are left out.
    """
    model = colmap.model_folder(folder)
    if model is None:
        raise UserError(f"{folder} has no camera poses: sparse/0/cameras.bin (or .txt) is missing; run COLMAP on it")
    cameras = {camera.number: camera for camera in colmap.read_cameras(model)}
    shots = colmap.read_shots(model)
    if not shots:
        raise UserError(f"{model} holds no images, so the scene has no poses; run COLMAP again")
    views = _checked(folder, [_colmap_frame(folder, model, cameras, shot) for shot in shots])
    return Scene(*views, *_cloud(model, {shot.number: view for view, shot in enumerate(shots)}))


def _colmap_frame(folder: Path, model: Path, cameras: dict[int, colmap.Camera], shot: colmap.Shot) -> Frame:
    where = f"{model} image {short(shot.name)}"
    camera = cameras.get(shot.camera)
    if camera is None:
        raise UserError(f"{where} uses camera {shot.camera}, which the model lacks; export the model again")
    if (camera.model, len(camera.params)) not in colmap.PINHOLES:
        raise UserError(f"{where}: its camera model {short(camera.model)} is no pinhole; {UNDISTORT}")
    focal = (camera.params[0], camera.params[-3])  # of (f, cx, cy) or (fx, fy, cx, cy)
    size, image = (camera.width, camera.height), folder / "images" / shot.name
    return Frame(where, image, size, focal, camera.params[-2:], colmap.world_from_cam(shot))


FORMATS: dict[str, Callable[[Path], Scene]] = {"nerfstudio": read_nerfstudio, "colmap": read_colmap}


def _checked(folder: Path, frames: list[Frame]) -> tuple[str, tuple[Path, ...], Cameras]:
    """Name, image paths and cameras of a scene, after the checks that every format needs."""
    seen: dict[str, str] = {}
    for frame in frames:
        path = os.path.normpath(frame.image)
        if path in seen:
            raise UserError(f"{frame.where} names the same image as {seen[path]}; remove one of the two frames")
        seen[path] = frame.where
        _check_frame(frame)
        if frame.size != frames[0].size:
            raise UserError(
                f"image {frame.image} is {_by(frame.size)}, {frames[0].image.name} is {_by(frames[0].size)}; "
                "all images of a scene must have one size, so crop or resize them and their cameras"
            )
    intrinsics = torch.tensor([[[f.focal[0], 0, f.center[0]], [0, f.focal[1], f.center[1]], [0, 0, 1]] for f in frames])
    poses = torch.stack([frame.pose for frame in frames]).float()
    width, height = map(int, frames[0].size)
    name = folder.resolve().name or "scene"
    return name, tuple(frame.image for frame in frames), Cameras(poses, intrinsics, height, width)


def _check_frame(frame: Frame) -> None:
    if problem := pose_problem(frame.pose):
        raise UserError(f"{frame.where}: the pose {problem}; export the poses again or remove the frame")
    if frame.pose[:3, 3].abs().max() > FARTHEST:
        raise UserError(
            f"{frame.where}: the camera is more than {FARTHEST:.0e} units off the origin; "
            "subtract an offset from all poses"
        )
    actual = _image_size(frame.image)
    if actual != frame.size:
        raise UserError(
            f"image {frame.image} is {_by(actual)} but its camera says {_by(frame.size)} ({frame.where}); "
            "resize the images or scale the cameras, so that both agree"
        )
    for size, focal, center, axis in zip(frame.size, frame.focal, frame.center, "xy", strict=True):
        if not FOCALS[0] <= focal / max(frame.size) <= FOCALS[1]:
            raise UserError(
                f"{frame.where}: focal length {focal:g} ({axis}) does not suit a {_by(frame.size)} image; "
                "give it in pixels"
            )
        if not abs(center - size / 2) <= size:
            raise UserError(
                f"{frame.where}: the principal point c{axis} = {center:g} is far outside the image of "
                f"{_by(frame.size)}; give it in pixels"
            )


def _by(size: tuple[float, float]) -> str:
    return f"{size[0]:g}x{size[1]:g}"


def _is_nerfstudio(folder: Path) -> bool:
    return (folder / "transforms.json").exists()


def _looks_like_scene(folder: Path) -> bool:
    return _is_nerfstudio(folder) or colmap.model_folder(folder) is not None or (folder / "images").is_dir()


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data folder {folder} {what}; give the folder that holds the scene")
    return folder


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check that it is a file you may read") from error


# --- Images ---


def load_image(path: str | Path) -> np.ndarray:
    """uint8 [H, W, 3], turned upright by the EXIF tag, whatever the file holds: grey, palette, CMYK, 16 bits.

    Transparent images are laid on white. Raises UserError when the file is missing, cut short or no image.
    """
    image = _decode(Path(path))
    if image.mode == "F":
        raise UserError(f"image {path} holds floating-point pixels; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip at 255
        grey = (np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def load_depth(path: str | Path, unit: float) -> Tensor:
    """float32 [H, W], camera z in scene units, from 16-bit grey in steps of ``unit``; 0 is unknown."""
    image = _decode(Path(path))
    if not image.mode.startswith("I"):
        raise UserError(f"depth map {path} has pixels of kind {image.mode}, not 16-bit grey; export it as 16-bit PNG")
    return torch.from_numpy(np.asarray(image).astype(np.float32)) * unit


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            turned = _orientation(image) != 1
            image.load()
            return ImageOps.exif_transpose(image) if turned else image
    except Exception as error:  # PIL's decoders raise nearly anything on damaged bytes
        raise _unreadable(path, error) from error


def _orientation(image: Image.Image) -> int:
    """1 is upright. A PNG's tag counts only if it precedes the pixels; to look behind, PIL decodes them."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(EXIF_ORIENTATION, 1)


def _image_size(path: Path) -> tuple[int, int]:
    """(width, height) after the EXIF turn, from the header.

    With poses a turn must be certain: where the tag does not exchange width and height, sizes cannot tell if
    the camera belongs to the stored or to the turned image, and the image is refused.
    """
    try:
        with Image.open(path) as image:
            size, orientation = image.size, _orientation(image)
    except Exception as error:  # as in _decode
        raise _unreadable(path, error) from error
    turned = size[::-1] if orientation in (5, 6, 7, 8) else size
    if orientation in range(2, 9) and turned == size:
        raise UserError(
            f"image {path} has EXIF orientation {orientation}, which its pose may or may not allow for; "
            "write upright pixels or remove the tag"
        )
    return turned


def _unreadable(path: Path, error: Exception) -> UserError:
    if not path.exists():
        return UserError(f"image {path} does not exist; put it there or remove its frame")
    empty = path.is_file() and path.stat().st_size == 0
    reason = "is empty (zero bytes)" if empty else f"cannot be read ({error})"
    return UserError(f"image {path} {reason}; copy it again or remove its frame")


# --- Points of a COLMAP model ---


def _cloud(model: Path, view_of: dict[int, int]) -> Cloud:
    """The model's points; ``view_of`` maps its image numbers to views, other observations are dropped."""
    points = colmap.read_points(model)
    if not points:
        return Cloud()
    positions = torch.tensor([point.position for point in points])
    colors = torch.tensor([point.color for point in points], dtype=torch.float32) / 255
    if not torch.isfinite(positions).all() or colors.min() < 0 or colors.max() > 1:
        raise UserError(f"points3D of {model} holds NaN, infinity or colours beyond 255; run COLMAP again")
    pairs = [(i, view_of[n]) for i, point in enumerate(points) for n in point.seen_in if n in view_of]
    return Cloud(positions, colors, torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2))


def _cloud_of_same_world(folder: Path, frames: list[Frame]) -> Cloud:
    """The points of the COLMAP model beside transforms.json, once the poses of the images in both agree."""
    model = colmap.model_folder(folder)
    if model is None:
        return Cloud()
    views = {_name_in_model(folder, frame.image): view for view, frame in enumerate(frames)}
    extent = max((frame.pose - frames[0].pose)[:3, 3].norm().item() for frame in frames) or 1.0
    view_of = {}
    for shot in colmap.read_shots(model):
        view = views.get(os.path.normpath(shot.name))
        if view is None:
            continue
        view_of[shot.number] = view
        error = (colmap.world_from_cam(shot) - frames[view].pose).abs()
        if not (error[:3, :3].max() <= SAME_WORLD and error[:3, 3].max() <= SAME_WORLD * extent):
            raise UserError(
                f"{model} and transforms.json place image {short(shot.name)} differently, so the points "
                "do not fit; export both from one reconstruction or move one of them away"
            )
    if not view_of:
        raise UserError(
            f"{model} and transforms.json have no image in common, so its points may not fit; "
            "export both from one reconstruction or move one of them away"
        )
    return _cloud(model, view_of)


def _name_in_model(folder: Path, image: Path) -> str:
    """COLMAP names images relative to their folder: images/a/1.jpg is a/1.jpg, and so is images_2/a/1.jpg."""
    return os.path.join("", *Path(os.path.relpath(image, folder)).parts[1:])
