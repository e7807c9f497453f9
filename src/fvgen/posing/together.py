"""Pictures whose lenses are known to where they were taken from: structure from motion that nothing is hidden from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fvgen.clips.clip import to_bytes
from fvgen.errors import UserError, first_line
from fvgen.geometry.cameras import Cameras
from fvgen.posing.reconstruct import build_models, extract, import_pycolmap, match, quiet
from fvgen.system.files import new_folder
from fvgen.system.packages import install

# Generated frames are small and smooth. COLMAP's own are 0.0067, and 30 points that place a picture: with these true
# clips of built-in rooms at 320x512 could not be placed (benchmarks/consistency.py).
CONTRAST = 0.002
FEWEST_POINTS = 15


class Together(NamedTuple):
    """V pictures in one world of arbitrary scale.

    world_from_cam: [V, 4, 4] float64, NaN where a picture could not be placed.
    points: [N, 3]. point, view: [M], pixels: [M, 2]: which point is seen where.
    matches: by two views, the lower first: [M, 2 (view), 2 (x, y)], those that some two cameras explain.
    """

    world_from_cam: Tensor
    points: Tensor
    point: Tensor
    view: Tensor
    pixels: Tensor
    matches: dict[tuple[int, int], Tensor]


def place_together(pictures: Iterable[Tensor], cameras: Cameras, anchors: Tensor) -> Together:
    """Structure from motion over pictures [3, H, W] in [0, 1] through the lenses (not the poses) of ``cameras``.

    Where there are several models, the one with two or more of the ``anchors`` [V] (bool) and most views is taken. The
    same pictures give the same bits. Raises UserError where pycolmap is missing or fails; placing none is an answer.
    """
    pycolmap = import_pycolmap(f"camera errors need pycolmap; `{install('photos')}`, or leave --cameras out")
    with tempfile.TemporaryDirectory() as folder:
        images, database, models = Path(folder) / "images", Path(folder) / "database.db", Path(folder) / "models"
        for place in (images, models):
            new_folder(place)
        for view, picture in enumerate(pictures):
            pixels = to_bytes(picture).permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(images / _name(view), compress_level=1)
        try:
            with quiet(pycolmap):
                extract(pycolmap, database, images, pycolmap.CameraMode.PER_IMAGE, CONTRAST)
                _set_lenses(pycolmap, database, cameras)
                match(pycolmap, database)
                found = build_models(pycolmap, database, images, models, FEWEST_POINTS)
                matches = _matches(pycolmap, database)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"COLMAP failed ({first_line(error)}); check the pictures") from error

    def rank(model) -> tuple[bool, int]:
        placed = [_view(image.name) for image in model.images.values() if image.has_pose]
        return int(anchors[placed].sum()) >= 2, len(placed)

    return _together(max(found.values(), key=rank, default=None), len(cameras), matches)


def _set_lenses(pycolmap, database: Path, cameras: Cameras) -> None:
    with pycolmap.Database.open(database) as opened:
        for image in opened.read_all_images():
            matrix = cameras.intrinsics[_view(image.name)].double()
            camera = opened.read_camera(image.camera_id)
            camera.model = pycolmap.CameraModelId.PINHOLE
            camera.params = [matrix[0, 0].item(), matrix[1, 1].item(), matrix[0, 2].item(), matrix[1, 2].item()]
            camera.has_prior_focal_length = True
            opened.update_camera(camera)


def _matches(pycolmap, database: Path) -> dict[tuple[int, int], Tensor]:
    with pycolmap.Database.open(database) as opened:
        views = {image.image_id: _view(image.name) for image in opened.read_all_images()}
        keys = {number: torch.from_numpy(opened.read_keypoints(number)[:, :2].copy()).double() for number in views}
        pairs, geometries = opened.read_two_view_geometries()
    found = {}
    for pair, geometry in zip(pairs, geometries, strict=True):
        one, other = pycolmap.pair_id_to_image_pair(pair)
        index = torch.from_numpy(geometry.inlier_matches.astype("int64")).reshape(-1, 2)
        both = torch.stack([keys[one][index[:, 0]], keys[other][index[:, 1]]], dim=1)
        first, second = views[one], views[other]
        if len(both):
            found[min(first, second), max(first, second)] = both if first < second else both.flip(1)
    return dict(sorted(found.items()))


def _together(model, count: int, matches: dict[tuple[int, int], Tensor]) -> Together:
    poses = torch.full((count, 4, 4), torch.nan, dtype=torch.float64)
    rows: list[tuple[int, int, float, float]] = []
    places: dict[int, Tensor] = {}
    for image in [] if model is None else sorted(model.images.values(), key=lambda image: image.name):
        if not image.has_pose:
            continue
        view = _view(image.name)
        poses[view] = torch.eye(4, dtype=torch.float64)
        poses[view, :3] = torch.from_numpy(image.cam_from_world().inverse().matrix())
        for seen in image.points2D:
            if seen.has_point3D():
                places.setdefault(seen.point3D_id, torch.from_numpy(model.points3D[seen.point3D_id].xyz.copy()))
                rows.append((seen.point3D_id, view, *seen.xy))
    number = {key: place for place, key in enumerate(places)}
    seen = torch.tensor([(number[key], *rest) for key, *rest in rows], dtype=torch.float64).reshape(-1, 4)
    points = torch.stack(list(places.values())) if places else torch.empty(0, 3, dtype=torch.float64)
    return Together(poses, points, seen[:, 0].long(), seen[:, 1].long(), seen[:, 2:], matches)


def _name(view: int) -> str:
    return f"{view:06d}.png"


def _view(name: str) -> int:
    return int(Path(name).stem)
