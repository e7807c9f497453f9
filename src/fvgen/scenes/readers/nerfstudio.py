"""nerfstudio's ``transforms.json``, and DL3DV-10K, which is published in that layout.

Source: nerfstudio documentation, "Data conventions"; the DL3DV-10K/Dataset repository.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.errors import UserError, short
from fvgen.geometry.conventions import from_opengl
from fvgen.scenes import colmap_files
from fvgen.scenes.images import image_size
from fvgen.scenes.readers.colmap import model_cloud
from fvgen.scenes.scene import MASKED, UNDISTORT, Cloud, Frame, Scene, image_folder, local, posed_scene
from fvgen.system.doors import read_json

SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG", ".webp")
PERSPECTIVE = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL")
DISTORTION = ("k1", "k2", "p1", "p2", "k3")
OTHER_DISTORTION = ("k4", "k5", "k6")
SPLITS = ("train", "val", "test")  # of NeRF's synthetic scenes and Blender's add-ons: transforms_train.json, ...
# Largest difference of two poses that are meant to be one: per entry of the rotation, and per scene extent.
SAME_WORLD = 1e-3


def read_nerfstudio(folder: Path, images: str | None = None) -> Scene:
    """``transforms.json``: OpenGL camera-to-world, intrinsics for all frames or each, optional depth maps.

    Lens distortion k1, k2, p1, p2 is undone on reading. Photographs may be in images_2, images_4 or images_8 instead of
    images: intrinsics are then scaled, and must come with ``w`` and ``h``. Points of a COLMAP model in the same folder
    are attached if its poses agree with those of transforms.json.
    """
    file = folder / "transforms.json"
    document, listed = _listed(file)
    frames = [_frame(folder, f"{file} frame {i}", document, frame, images) for i, frame in enumerate(listed)]
    unit = _number(document, "depth_unit_scale_factor", str(file), positive=True) or 0.001
    scene = posed_scene(folder, frames, unit)
    cloud = _cloud_of_same_world(folder, frames, document)
    return replace(scene.with_cloud(cloud), notes=_notes(folder, document, listed, cloud))


def read_splits(folder: Path, images: str | None = None) -> Scene:
    """NeRF's synthetic layout: the frames of ``transforms_train.json``, ``_val`` and ``_test`` as one scene."""
    frames, notes = [], []
    for split in SPLITS:
        file = folder / f"transforms_{split}.json"
        if file.exists():
            document, listed = _listed(file)
            frames += [_frame(folder, f"{file} frame {i}", document, frame, images) for i, frame in enumerate(listed)]
            notes.append(f"{len(listed)} of {file.name}")
    scene = posed_scene(folder, frames)
    return replace(scene, notes=(f"frames of all splits are used: {', '.join(notes)}",))


def _listed(file: Path) -> tuple[dict, list]:
    """The document and its frames."""
    try:
        document = read_json(file)
    except UserError as error:
        raise UserError(f"{error}: export the poses again") from error
    listed = document.get("frames") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{file} has no list of frames, so the scene has no poses; export the poses again")
    return document, listed


def generated_views(folder: Path, scene: Scene) -> list[bool]:
    """Which views a model made, as the folder's transforms.json says; none where it does not say."""
    found = {
        Path(frame["file_path"]).name: frame.get("generated") is True
        for frame in stated(folder).get("frames", [])
        if isinstance(frame, dict) and isinstance(frame.get("file_path"), str)
    }
    return [found.get(path.name, False) for path in scene.image_paths]


def stated(folder: Path) -> dict[str, Any]:
    """transforms.json, which the reader has judged; empty for other formats."""
    file = folder / "transforms.json"
    found = read_json(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _notes(folder: Path, document: dict, listed: list, cloud: Cloud) -> tuple[str, ...]:
    """What the scene has and nobody uses."""
    notes = []
    if masked := sum(1 for frame in listed if isinstance(frame, dict) and frame.get("mask_path")):
        notes.append(MASKED.format(masked))
    ply = document.get("ply_file_path")
    if isinstance(ply, str) and cloud.points is None:
        notes.append(f"the points of {short(ply)} are not used, for it does not say which views show them")
    model = colmap_files.model_folder(folder)
    if model is not None and (others := colmap_files.other_models(model)):
        notes.append(f"{model.name} is read, the largest model; {', '.join(others)} of {model.parent} are left aside")
    return tuple(notes)


def read_dl3dv(folder: Path, images: str | None = None) -> Scene:
    """A scene of DL3DV-10K as published: nerfstudio's layout in its folder, or in the sub-folder ``nerfstudio``.

    480P comes with images_8, 960P with images_4, 4K with images, all with the same transforms.json.
    """
    scene = read_nerfstudio(folder / "nerfstudio" if (folder / "nerfstudio").is_dir() else folder, images)
    return replace(scene, name=folder.resolve().name)


def _frame(folder: Path, where: str, document: dict, frame: object, images: str | None) -> Frame:
    if not isinstance(frame, dict) or not isinstance(name := frame.get("file_path"), str) or not name:
        raise UserError(f"{where} has no file_path; export the poses again")
    where = f"{where} ({short(name)})"
    values = {**document, **frame}
    model = values.get("camera_model", "PINHOLE")
    if model not in PERSPECTIVE or values.get("is_fisheye"):
        raise UserError(f"{where}: the camera model {short(model)} is not perspective; {UNDISTORT}")
    if bent := [key for key in OTHER_DISTORTION if _number(values, key, where)]:
        raise UserError(
            f"{where}: lens distortion {bent[0]} is not zero, only k1, k2, p1, p2, k3 are undone; {UNDISTORT}"
        )

    image, factor = _find_image(folder, name, images)
    if image is None:
        raise UserError(f"{where}: the image is missing in {folder}; put it there or remove the frame")
    width, height = image_size(image)
    size = (_number(values, "w", where, positive=True), _number(values, "h", where, positive=True))
    if factor != 1 and None in size:
        raise UserError(f"{where}: {image.parent.name} holds smaller images, but w and h are missing; add them")
    size = (size[0] or width, size[1] or height)
    focal_x = _number(values, "fl_x", where, positive=True) or _focal(values, "camera_angle_x", size[0], where)
    focal_y = _number(values, "fl_y", where, positive=True) or _focal(values, "camera_angle_y", size[1], where)
    if focal_x is None:
        raise UserError(f"{where}: there is neither fl_x nor camera_angle_x; add the focal length in pixels")
    x, y = _number(values, "cx", where), _number(values, "cy", where)
    center = (size[0] / 2 if x is None else x, size[1] / 2 if y is None else y)

    mask = frame.get("mask_path")
    if mask is not None and not isinstance(mask, str):
        raise UserError(f"{where}: mask_path is {short(mask)}; give the path of an image or remove it")
    depth = frame.get("depth_file_path")
    if depth is not None and not isinstance(depth, str):
        raise UserError(f"{where}: depth_file_path is {short(depth)}; give the path of a 16-bit image or remove it")
    return Frame(
        where,
        image,
        size,
        (focal_x, focal_y or focal_x),
        center,
        from_opengl(_matrix(frame.get("transform_matrix"), where)),
        local(folder, depth) if depth else None,
        tuple(_number(values, key, where) or 0.0 for key in DISTORTION),
        factor,
        mask=_mask(folder, mask, factor) if mask else None,
    )


def _mask(folder: Path, name: str, factor: int) -> Path:
    """The mask as named; for smaller photographs masks_N will do as well, where masks itself is not there."""
    path = local(folder, name)
    smaller = path.parent.with_name(f"{path.parent.name}_{factor}") / path.name
    return smaller if factor != 1 and not path.exists() and smaller.exists() else path


def _find_image(folder: Path, name: str, images: str | None) -> tuple[Path | None, int]:
    """The image of a frame and its factor: as named, or in one of IMAGE_FOLDERS if the name begins with ``images``."""
    if "\\" in name and not os.path.isfile(folder / name):  # written on Windows
        name = name.replace("\\", "/")
    parts = Path(name).parts
    for suffix in SUFFIXES:
        if not parts or parts[0] != "images":
            candidate, factor = folder / (name + suffix), 1
        else:
            rest = str(Path(*parts[1:])) + suffix
            chosen, factor = image_folder(folder, rest, images)
            candidate = folder / chosen / rest
        if os.path.isfile(candidate):
            return candidate, factor
    return None, 1


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


def _focal(values: dict, key: str, size: float, where: str) -> float | None:
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


def _cloud_of_same_world(folder: Path, frames: list[Frame], document: dict) -> Cloud:
    """The points of the COLMAP model beside transforms.json, once the poses of the images in both agree: as they are,
    or after ``applied_transform``, the 3x4 that took COLMAP's world to this one. Images have the same names, or frames
    say their numbers in ``colmap_im_id``."""
    model = colmap_files.model_folder(folder)
    if model is None:
        return Cloud()
    views = {_name_in_model(folder, frame.image): view for view, frame in enumerate(frames)}
    numbers = {
        frame["colmap_im_id"]: view
        for view, frame in enumerate(document["frames"])
        if isinstance(frame.get("colmap_im_id"), int)
    }
    motion = _applied(document, str(folder / "transforms.json"))
    try:
        return _moved_cloud(model, frames, views, numbers, None)
    except UserError:
        if motion is None:
            raise
        return _moved_cloud(model, frames, views, numbers, motion)


def _applied(document: dict, where: str) -> Tensor | None:
    """[4, 4] of ``applied_transform``, or None."""
    rows = document.get("applied_transform")
    return None if rows is None else _matrix(rows, f"{where}, applied_transform")


def _moved_cloud(
    model: Path, frames: list[Frame], views: dict[str, int], numbers: dict[int, int], motion: Tensor | None
) -> Cloud:
    extent = max((frame.pose - frames[0].pose)[:3, 3].norm().item() for frame in frames) or 1.0
    view_of = {}
    for shot in colmap_files.read_shots(model):
        view = views.get(os.path.normpath(shot.name.replace("\\", "/")), numbers.get(shot.number))
        if view is None:
            continue
        view_of[shot.number] = view
        pose = colmap_files.world_from_cam(shot)
        error = ((pose if motion is None else motion @ pose) - frames[view].pose).abs()
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
    cloud = model_cloud(model, view_of)
    if motion is None or cloud.points is None:
        return cloud
    turned = cloud.points.double() @ motion[:3, :3].T + motion[:3, 3]
    return replace(cloud, points=turned.float())


def _name_in_model(folder: Path, image: Path) -> str:
    """COLMAP names images relative to their folder: images/a/1.jpg is a/1.jpg, and so is images_2/a/1.jpg."""
    return os.path.join("", *Path(os.path.relpath(image, folder)).parts[1:])
