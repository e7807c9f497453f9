"""What all readers of posed photographs share: `Frame`, a view as its format tells it; the checks; and `Scene`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, pose_problem
from fvgen.scenes.images import (
    depth_size,
    fit_depth,
    image_size,
    load_depth,
    load_image,
    undistorted,
    undistorted_zoom,
)

UNDISTORT = "undistort the images first, for example with `colmap image_undistorter`"
# Cameras farther from the origin (scene units) would lose more than 0.06 units to 32-bit rounding.
FARTHEST = 1e6
# Plausible focal lengths in image sizes: others are usually fractions or millimetres by mistake.
FOCALS = (0.05, 100.0)
# Of the image's size: farther off its middle a principal point is an offset, a fraction or a focal length by mistake.
CENTRE = 0.4
SQUARE = 3.0  # how many times higher than wide pixels may be; anamorphic lenses and old videos reach 2
# What is not done with masks yet: the latents that networks are trained on show what is hidden.
MASKED = "what the masks of {} frames hide gives no points and no scores, but training shows it"
# Folders of photographs and how much smaller than the camera's size theirs are.
IMAGE_FOLDERS = {"images": 1, "images_2": 2, "images_4": 4, "images_8": 8}


@dataclass(frozen=True)
class Cloud:
    """The three point fields of a `Scene`."""

    points: Tensor | None = None
    point_colors: Tensor | None = None
    observations: Tensor | None = None


@dataclass(frozen=True)
class Scene:
    """V posed photographs of one size, and what is known of the geometry.

    points: [N, 3] in the world, or None.
    point_colors: [N, 3] in [0, 1]. COLMAP averages a point's colour over all photographs that show it, also
        held-out ones; an honest evaluation takes colours from known photographs only, as `fvgen.clips.from_scene` does.
    observations: [M, 2] int64, rows (point, view): the views in which a point was found.
    depth_paths: one map per view, of the image's size, camera z in ``depth_unit`` scene units; or None.
    lenses: [V, 9] float64, fx, fy, cx, cy, k1, k2, p1, p2, k3 of the stored images where any is distorted, else None.
    as_stored: views whose camera is that of the stored pixels, although an EXIF tag says to turn them.
    masks: view -> an image of the photograph's size, or so many times larger as those of another image folder are,
        black where what it shows is no part of the scene (people).
    notes: what a reader found beside all this and did not use, a sentence each.

    ``cameras`` are pinholes in any case: read pixels through `image` and `depth`, which undo the distortion.
    """

    name: str
    image_paths: tuple[Path, ...]
    cameras: Cameras
    points: Tensor | None = None
    point_colors: Tensor | None = None
    observations: Tensor | None = None
    depth_paths: tuple[Path, ...] | None = None
    depth_unit: float = 0.001
    lenses: Tensor | None = None
    as_stored: frozenset[int] = frozenset()
    masks: Mapping[int, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image_paths)

    def image(self, view: int) -> np.ndarray:
        """uint8 [H, W, 3], upright and undistorted. Raises UserError when the file is damaged."""
        pixels = load_image(self.image_paths[view], upright=view not in self.as_stored)
        return pixels if self.lenses is None else undistorted(pixels, self.lenses[view], self.cameras.intrinsics[view])

    def depth(self, view: int) -> Tensor:
        """float32 [H, W], camera z in scene units, 0 is unknown; only where there are ``depth_paths``."""
        assert self.depth_paths is not None
        depth = load_depth(self.depth_paths[view], self.depth_unit)
        if self.lenses is None:
            return depth
        return torch.from_numpy(undistorted(depth.numpy(), self.lenses[view], self.cameras.intrinsics[view]))

    def shows(self, view: int) -> Tensor | None:
        """bool [H, W]: where a view shows the scene, by its mask; None where it has none."""
        if view not in self.masks:
            return None
        mask = load_image(self.masks[view], upright=view not in self.as_stored)[..., 0]
        mask = fit_depth(torch.from_numpy(mask), self.cameras.height, self.cameras.width).numpy()
        if self.lenses is not None:
            mask = undistorted(mask, self.lenses[view], self.cameras.intrinsics[view])
        return torch.from_numpy(mask >= 128)

    def shown(self, views: Sequence[int], height: int, width: int) -> Tensor | None:
        """bool [F, height, width]: `shows` of the views as `fit_image` cuts them; None where none has a mask."""
        masks = [self.shows(view) for view in views]
        if all(mask is None for mask in masks):
            return None
        everything = torch.ones(height, width, dtype=torch.bool)
        return torch.stack([everything if mask is None else fit_depth(mask, height, width) for mask in masks])

    def with_cloud(self, cloud: Cloud) -> Scene:
        """The same scene with these points."""
        return replace(self, points=cloud.points, point_colors=cloud.point_colors, observations=cloud.observations)

    def seen_by(self, view: int) -> Tensor:
        """[N] bool: the points that were found in this view."""
        assert self.points is not None and self.observations is not None
        seen = torch.zeros(self.points.shape[0], dtype=torch.bool)
        seen[self.observations[self.observations[:, 1] == view, 0]] = True
        return seen


@dataclass(frozen=True)
class Frame:
    """One view as its format tells it; ``where`` opens error messages about it.

    The image may be ``factor`` times smaller than ``size``, which focal, center and depth are for.
    """

    where: str
    image: Path
    size: tuple[float, float]  # width, height, as the format says
    focal: tuple[float, float]
    center: tuple[float, float]
    pose: Tensor  # [4, 4] float64 camera-to-world, OpenCV axes
    depth: Path | None = None
    distortion: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0)  # k1, k2, p1, p2, k3
    factor: int = 1
    as_stored: bool = False
    mask: Path | None = None


def posed_scene(folder: Path, frames: list[Frame], depth_unit: float = 0.001) -> Scene:
    """A `Scene` of frames, after the checks that every format needs. Raises UserError for what is wrong with any."""
    seen: dict[str, str] = {}
    for frame in frames:
        path = os.path.normpath(frame.image)
        if path in seen:
            raise UserError(f"{frame.where} names the same image as {seen[path]}; remove one of the two frames")
        seen[path] = frame.where
    frames = [_checked(frame) for frame in frames]
    for frame in frames:
        if frame.size != frames[0].size:
            raise UserError(
                f"image {frame.image} is {_by(frame.size)}, {frames[0].image.name} is {_by(frames[0].size)}; "
                "all images of a scene must have one size, so crop or resize them and their cameras"
            )
    lenses = torch.tensor([[*f.focal, *f.center, *f.distortion] for f in frames], dtype=torch.float64)
    bent = bool(lenses[:, 4:].any())
    zooms = {lens: _zoom(frame, lens) for lens, frame in zip(map(tuple, lenses.tolist()), frames, strict=True)}
    zoom = lenses.new_tensor([zooms[tuple(lens)] for lens in lenses.tolist()])
    intrinsics = torch.eye(3).repeat(len(frames), 1, 1)
    intrinsics[:, [0, 1], [0, 1]] = (lenses[:, :2] * zoom[:, None]).float()
    intrinsics[:, :2, 2] = lenses[:, 2:4].float()
    poses = torch.stack([frame.pose for frame in frames]).float()
    width, height = map(int, frames[0].size)
    return Scene(
        folder.resolve().name or "scene",
        tuple(frame.image for frame in frames),
        Cameras(poses, intrinsics, height, width),
        depth_paths=_depths(frames),
        depth_unit=depth_unit,
        lenses=lenses if bent else None,
        as_stored=frozenset(view for view, frame in enumerate(frames) if frame.as_stored),
        masks=_masks(frames),
    )


def local(folder: Path, name: str) -> Path:
    """A file that a scene names; a name with back-slashes that is no file is one of Windows."""
    path = folder / name
    return path if "\\" not in name or path.exists() else folder / name.replace("\\", "/")


def mask_beside(folder: Path, name: str) -> Path | None:
    """The mask of the photograph ``name`` in ``folder``/masks: NAME.png as COLMAP has it (1.jpg.png), or STEM.png."""
    names = (f"{name}.png", f"{os.path.splitext(name)[0]}.png")
    return next((path for path in (local(folder / "masks", one) for one in names) if path.is_file()), None)


def image_folder(folder: Path, name: str, wanted: str | None) -> tuple[str, int]:
    """Which of IMAGE_FOLDERS to read and its factor: ``wanted``, else the first that holds the file ``name``.

    Where none does it is "images", so that the message about the missing file names that.
    """
    if wanted is not None:
        if wanted not in IMAGE_FOLDERS:
            raise UserError(f"unknown image folder {wanted!r}; choose one of {', '.join(IMAGE_FOLDERS)}")
        return wanted, IMAGE_FOLDERS[wanted]
    found = (entry for entry in IMAGE_FOLDERS.items() if os.path.isfile(folder / entry[0] / name))
    return next(found, ("images", 1))


def _depths(frames: list[Frame]) -> tuple[Path, ...] | None:
    """The depth map of every frame, sizes checked; None when no frame has one."""
    if all(frame.depth is None for frame in frames):
        return None
    for frame in frames:
        if frame.depth is None:
            raise UserError(f"{frame.where} has no depth_file_path but others have; add it, or remove it everywhere")
        if depth_size(frame.depth) != frame.size:
            raise UserError(f"depth map {frame.depth} has another size than its image; resize it (nearest) to match")
    return tuple(frame.depth for frame in frames)


def _masks(frames: list[Frame]) -> dict[int, Path]:
    masks = {view: frame.mask for view, frame in enumerate(frames) if frame.mask is not None}
    for view, mask in masks.items():
        size = image_size(mask, upright=not frames[view].as_stored)
        if not any(_times(size, frames[view].size, factor) for factor in IMAGE_FOLDERS.values()):
            raise UserError(f"mask {mask} has another size than its image; resize it (nearest) or remove mask_path")
    return masks


def _checked(frame: Frame) -> Frame:
    """The frame at the size of its image. Raises UserError for a pose or a lens that cannot be."""
    if problem := pose_problem(frame.pose):
        raise UserError(f"{frame.where}: the pose {problem}; export the poses again or remove the frame")
    if frame.pose[:3, 3].abs().max() > FARTHEST:
        raise UserError(
            f"{frame.where}: the camera is more than {FARTHEST:.0e} units off the origin; "
            "subtract an offset from all poses"
        )
    frame = _at_image_size(frame)
    actual = image_size(frame.image)
    if actual != frame.size and image_size(frame.image, upright=False) == frame.size:
        # COLMAP ignores the EXIF turn: its camera is that of the stored pixels, as the sizes tell.
        frame = replace(frame, as_stored=True)
    elif actual != frame.size:
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
        if not abs(center - size / 2) <= CENTRE * size:
            raise UserError(
                f"{frame.where}: the principal point c{axis} = {center:g} is far from the middle of the image of "
                f"{_by(frame.size)}; give it in pixels from the top left corner, about {size / 2:g}"
            )
    if not 1 / SQUARE <= frame.focal[0] / frame.focal[1] <= SQUARE:
        raise UserError(
            f"{frame.where}: focal lengths {frame.focal[0]:g} and {frame.focal[1]:g} do not suit one lens; give both "
            "in pixels of the stored image"
        )
    return frame


def _at_image_size(frame: Frame) -> Frame:
    """The frame scaled to an image that is ``factor`` times smaller, give or take the rounding to whole pixels."""
    actual = image_size(frame.image)
    if frame.factor == 1 or not _times(frame.size, actual, frame.factor):
        return frame
    x, y = (found / said for found, said in zip(actual, frame.size, strict=True))
    focal, center = frame.focal, frame.center
    return replace(frame, size=actual, focal=(focal[0] * x, focal[1] * y), center=(center[0] * x, center[1] * y))


def _times(large: tuple[float, float], small: tuple[float, float], factor: int) -> bool:
    """Whether a size is ``factor`` times the other, give or take the rounding to whole pixels."""
    return all(abs(b - a / factor) < 1 for a, b in zip(large, small, strict=True))


def _zoom(frame: Frame, lens: tuple[float, ...]) -> float:
    if not any(lens[4:]):
        return 1.0
    zoom = undistorted_zoom(frame.size, torch.tensor(lens, dtype=torch.float64))
    if zoom is None:
        raise UserError(
            f"{frame.where}: the lens distortion {', '.join(f'{v:g}' for v in frame.distortion)} folds the image "
            f"or bends it too much; {UNDISTORT}"
        )
    return zoom


def _by(size: tuple[float, float]) -> str:
    return f"{size[0]:g}x{size[1]:g}"
