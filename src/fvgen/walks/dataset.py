"""Given and generated views as one data set that other programs open as it is: ``transforms.json`` (nerfstudio, brush,
instant-ngp), ``sparse/0`` (COLMAP, gsplat) and ``points.ply``, over the pictures in ``images``.

Source: nerfstudio documentation, "Data conventions"; COLMAP documentation, "Output Format".
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fvgen.clips.clip import to_bytes
from fvgen.geometry.cameras import Cameras, project
from fvgen.geometry.conventions import to_opengl
from fvgen.geometry.pointcloud import unproject
from fvgen.scenes.colmap_write import Tracks, write_model
from fvgen.system.files import atomic_path, new_folder, write_bytes, write_json
from fvgen.walks.render import Cloud

MOST_POINTS = 20_000  # in sparse/0 and points.ply, evenly chosen
AGREE = 0.02  # relative: a point is seen by another view whose depth there differs by less


class View(NamedTuple):
    """image: [3, H, W] in [0, 1]; ``generated``: by a model, else a photograph."""

    name: str
    image: Tensor
    generated: bool


def write_dataset(folder: Path, views: list[View], cameras: Cameras, cloud: Cloud, places: list[int]) -> None:
    """Into ``folder``; ``places``: which of the views are those of the cloud, in its order."""
    points, colors, tracks = tracked_points(cloud, places)
    write_ply(folder / "points.ply", points, colors)
    names = [view.name for view in views]
    with atomic_path(folder / "sparse") as temporary:
        write_model(temporary / "0", cameras, names, points, colors, tracks)
    write_views(folder, views, cameras, ply_file_path="points.ply")


def write_views(folder: Path, views: list[View], cameras: Cameras, **more: str) -> None:
    """``images`` and ``transforms.json``, with ``more`` at its top."""
    new_folder(folder / "images")
    for view in views:
        save_png(folder / "images" / view.name, view.image)
    poses = to_opengl(cameras.world_from_cam.double()).tolist()
    lens = cameras.intrinsics.double()
    frames = [
        {
            "file_path": f"images/{view.name}",
            "transform_matrix": pose,
            "fl_x": matrix[0, 0].item(),
            "fl_y": matrix[1, 1].item(),
            "cx": matrix[0, 2].item(),
            "cy": matrix[1, 2].item(),
            "generated": view.generated,
        }
        for view, pose, matrix in zip(views, poses, lens, strict=True)
    ]
    document = {"camera_model": "OPENCV", "w": cameras.width, "h": cameras.height, **more}
    write_json(folder / "transforms.json", document | {"frames": frames})


def save_png(path: Path, image: Tensor) -> None:
    """[3, H, W] in [0, 1]."""
    with atomic_path(path) as temporary:
        Image.fromarray(to_bytes(image).permute(1, 2, 0).contiguous().numpy()).save(temporary, "PNG")


def tracked_points(cloud: Cloud, places: list[int]) -> tuple[Tensor, Tensor, Tracks]:
    """Points [N, 3], colours [N, 3] and where they are seen: in the view that each comes from, at its pixel's middle,
    and in those whose depth agrees."""
    points, colors = unproject(cloud.depth, cloud.photographs, cloud.cameras)
    view, y, x = (cloud.depth > 0).nonzero(as_tuple=True)
    chosen = torch.linspace(0, len(points) - 1, min(MOST_POINTS, len(points))).round().long()
    points, colors, view = points[chosen], colors[chosen], view[chosen]
    own = torch.stack([x[chosen], y[chosen]], dim=1) + 0.5
    pixels, depth = project(points, cloud.cameras)
    height, width = cloud.depth.shape[1:]
    found = [(torch.arange(len(points)), view, own)]
    for other in range(len(cloud.views)):
        column, row = pixels[other].floor().long().unbind(-1)
        inside = (depth[other] > 0) & (column >= 0) & (row >= 0) & (column < width) & (row < height) & (view != other)
        there = cloud.depth[other][row.clamp(0, height - 1), column.clamp(0, width - 1)]
        seen = (inside & ((there / depth[other] - 1).abs() < AGREE)).nonzero().flatten()
        found.append((seen, torch.full_like(seen, other), pixels[other][seen]))
    point, seen_by, place = (torch.cat(part) for part in zip(*found, strict=True))
    return points, colors, (point, torch.tensor(places)[seen_by], place)


def write_ply(path: Path, points: Tensor, colors: Tensor) -> None:
    """Binary, little-endian: x, y, z, red, green, blue."""
    kind = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]
    rows = np.empty(len(points), kind)
    shades = to_bytes(colors)
    for axis, name in enumerate("xyz"):
        rows[name] = points[:, axis].numpy()
    for axis, name in enumerate(("red", "green", "blue")):
        rows[name] = shades[:, axis].numpy()
    types = {"<f4": "float", "u1": "uchar"}
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    lines += [*(f"property {types[code]} {name}" for name, code in kind), "end_header", ""]
    with atomic_path(path) as temporary:
        write_bytes(temporary, "\n".join(lines).encode() + rows.tobytes())
