"""COLMAP's sparse models with their photographs; so Mip-NeRF 360 and Tanks and Temples are published.

Source: COLMAP documentation, "Output Format" and "Camera Models".
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fvgen.errors import UserError, short
from fvgen.scenes import colmap_files
from fvgen.scenes.scene import MASKED, UNDISTORT, Cloud, Frame, Scene, image_folder, local, mask_beside, posed_scene

# Where each model's focal lengths (x, y), principal point and k1, k2, p1, p2 are among its parameters.
LAYOUTS: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    "SIMPLE_PINHOLE": ((0, 0), ()),
    "PINHOLE": ((0, 1), ()),
    "SIMPLE_RADIAL": ((0, 0), (3,)),
    "RADIAL": ((0, 0), (3, 4)),
    "OPENCV": ((0, 1), (4, 5, 6, 7)),
    "FULL_OPENCV": ((0, 1), (4, 5, 6, 7, 8)),  # its k4, k5, k6 must be zero
}


def read_colmap(folder: Path, images: str | None = None) -> Scene:
    """A model in ``sparse/0`` or ``sparse``, .bin or .txt; photographs in ``images``; views sorted by name.

    Where there is no ``images``, or when asked to, they are read from images_2, images_4 or images_8, as Mip-NeRF 360
    has them, with the cameras scaled to those. Distortion of the models in LAYOUTS is undone on reading. COLMAP 4's
    rigs and frames repeat what its images hold, and are left out.
    """
    model = colmap_files.model_folder(folder)
    if model is None:
        raise UserError(f"{folder} has no camera poses: sparse/0/cameras.bin (or .txt) is missing; run COLMAP on it")
    cameras = {camera.number: camera for camera in colmap_files.read_cameras(model)}
    shots = colmap_files.read_shots(model)
    if not shots:
        raise UserError(f"{model} holds no images, so the scene has no poses; run COLMAP again")
    chosen, factor = image_folder(folder, shots[0].name, images)
    frames = [_frame(folder, chosen, factor, model, cameras, shot) for shot in shots]
    scene = posed_scene(folder, frames)
    scene = replace(scene, notes=model_notes(folder, model, len(scene.masks)))
    return scene.with_cloud(model_cloud(model, {shot.number: view for view, shot in enumerate(shots)}))


def _frame(
    folder: Path,
    chosen: str,
    factor: int,
    model: Path,
    cameras: dict[int, colmap_files.Camera],
    shot: colmap_files.Shot,
) -> Frame:
    where = f"{model} image {short(shot.name)}"
    camera = cameras.get(shot.camera)
    if camera is None:
        raise UserError(f"{where} uses camera {shot.camera}, which the model lacks; export the model again")
    if camera.model not in LAYOUTS or (camera.model, len(camera.params)) not in colmap_files.MODELS:
        known = ", ".join(LAYOUTS)
        raise UserError(f"{where}: its camera model {short(camera.model)} is not one of {known}; {UNDISTORT}")
    (x, y), bends = LAYOUTS[camera.model]
    if camera.model == "FULL_OPENCV" and any(camera.params[9:]):
        raise UserError(
            f"{where}: k4, k5 or k6 of its lens are not zero, only k1, k2, p1, p2, k3 are undone; {UNDISTORT}"
        )
    return Frame(
        where,
        local(folder / chosen, shot.name),
        (camera.width, camera.height),
        (camera.params[x], camera.params[y]),
        (camera.params[y + 1], camera.params[y + 2]),
        colmap_files.world_from_cam(shot),
        None,
        (*(camera.params[i] for i in bends), 0.0, 0.0, 0.0, 0.0, 0.0)[:5],
        factor,
        mask=mask_beside(folder, shot.name),
    )


def model_notes(folder: Path, model: Path, masked: int) -> tuple[str, ...]:
    """What lies beside the model and is not used, or not in everything."""
    notes = []
    if others := colmap_files.other_models(model):
        notes.append(f"{model.name} is read, the largest model; {', '.join(others)} of {model.parent} are left aside")
    if masked:
        notes.append(MASKED.format(masked))
    elif (folder / "masks").is_dir():
        notes.append(f"none of {folder / 'masks'} has the name of a photograph (1.jpg.png or 1.png), so none is used")
    return tuple(notes)


def model_cloud(model: Path, view_of: dict[int, int]) -> Cloud:
    """The model's points; ``view_of`` maps its image numbers to views, other observations are dropped."""
    points = colmap_files.read_points(model)
    if not points:
        return Cloud()
    positions = torch.tensor([point.position for point in points])
    colors = torch.tensor([point.color for point in points], dtype=torch.float32) / 255
    if not torch.isfinite(positions).all() or colors.min() < 0 or colors.max() > 1:
        raise UserError(f"points3D of {model} holds NaN, infinity or colours beyond 255; run COLMAP again")
    pairs = [(i, view_of[n]) for i, point in enumerate(points) for n in point.seen_in if n in view_of]
    return Cloud(positions, colors, torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2))
