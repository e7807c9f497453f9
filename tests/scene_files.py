"""A small posed scene, written to disk in the layouts that the readers know."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fvgen.geometry.cameras import Cameras, look_at, project
from fvgen.geometry.conventions import from_opengl

VIEWS, HEIGHT, WIDTH = 4, 18, 24
NAMES = [f"{i:02d}.png" for i in range(VIEWS)]
FOCAL, CENTER = (20.0, 21.0), (11.5, 9.5)


def world() -> tuple[Cameras, torch.Tensor, torch.Tensor]:
    """Cameras on an arc, points around the origin, and in which views each point was found [N, V]."""
    angle = torch.linspace(-0.4, 0.4, VIEWS, dtype=torch.float64)
    position = torch.stack([4 * angle.sin(), 0.3 * angle, -4 * angle.cos()], dim=-1)
    poses = look_at(position, torch.zeros_like(position), position.new_tensor([0.0, -1.0, 0.0]))
    intrinsics = torch.tensor([[FOCAL[0], 0, CENTER[0]], [0, FOCAL[1], CENTER[1]], [0, 0, 1]], dtype=torch.float64)
    points = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5
    found = torch.rand(30, VIEWS, generator=torch.Generator().manual_seed(1)) < 0.6
    return Cameras(poses, intrinsics.expand(VIEWS, 3, 3).clone(), HEIGHT, WIDTH), points, found


def write_images(folder: Path, names: list[str] = NAMES) -> None:
    for i, name in enumerate(names):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)


def write_depth(folder: Path) -> None:
    (folder / "depth").mkdir()
    for i in range(VIEWS):
        Image.fromarray(np.full((HEIGHT, WIDTH), 4000 + i, dtype=np.uint16)).save(folder / "depth" / f"{i:02d}.png")


def document(depth: bool = False) -> dict:
    poses = from_opengl(world()[0].world_from_cam).tolist()
    frames = [{"file_path": f"images/{name}", "transform_matrix": poses[i]} for i, name in enumerate(NAMES)]
    if depth:
        frames = [frame | {"depth_file_path": f"depth/{i:02d}.png"} for i, frame in enumerate(frames)]
    intrinsics = {
        "fl_x": FOCAL[0],
        "fl_y": FOCAL[1],
        "cx": CENTER[0],
        "cy": CENTER[1],
        "w": WIDTH,
        "h": HEIGHT,
    }
    return {"camera_model": "PINHOLE", **intrinsics, "k1": 0.0, "frames": frames}


def write_nerfstudio(folder: Path, contents: dict | None = None) -> Path:
    write_images(folder)
    (folder / "transforms.json").write_text(json.dumps(contents or document()))
    return folder


def quaternion(rotation: torch.Tensor) -> list[float]:
    """(w, x, y, z) of a rotation by less than a half turn, from its trace."""
    w = math.sqrt(max(0.0, 1 + rotation.trace().item())) / 2
    axis = torch.stack(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    return [w, *(axis / (4 * w)).tolist()]


def write_colmap(folder: Path, binary: bool = True, order: tuple[int, ...] = (2, 0, 3, 1)) -> Path:
    """A PINHOLE model as COLMAP's documentation lays it out; images numbered from 10, in the given order."""
    if not (folder / "images").exists():
        write_images(folder)
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    cameras, points, found = world()
    pose = cameras.cam_from_world
    pixels, _ = project(points, cameras)
    params = [*FOCAL, *CENTER]
    shots = [(10 + i, [*quaternion(pose[i, :3, :3]), *pose[i, :3, 3].tolist()], NAMES[i]) for i in order]
    tracks = [[(10 + int(v), int(n)) for v in found[n].nonzero()[:, 0]] for n in range(len(points))]
    colors = [(n, 2 * n, 255 - n) for n in range(len(points))]
    if binary:
        (model / "cameras.bin").write_bytes(struct.pack("<QIiQQ4d", 1, 7, 1, WIDTH, HEIGHT, *params))
        data = struct.pack("<Q", VIEWS)
        for number, values, name in shots:
            data += struct.pack("<I7dI", number, *values, 7) + name.encode() + b"\0" + struct.pack("<Q", len(points))
            for n, (x, y) in enumerate(pixels[number - 10].tolist()):
                data += struct.pack("<ddq", x, y, n + 1 if found[n, number - 10] else -1)
        (model / "images.bin").write_bytes(data)
        data = struct.pack("<Q", len(points))
        for n, (xyz, color, track) in enumerate(zip(points.tolist(), colors, tracks, strict=True)):
            data += struct.pack("<Q3d3BdQ", n + 1, *xyz, *color, 0.5, len(track))
            data += b"".join(struct.pack("<II", *seen) for seen in track)
        (model / "points3D.bin").write_bytes(data)
        return folder
    (model / "cameras.txt").write_text(f"# cameras\n7 PINHOLE {WIDTH} {HEIGHT} {' '.join(map(str, params))}\n")
    lines = ["# images"]
    for number, values, name in shots:
        lines.append(f"{number} {' '.join(map(repr, values))} 7 {name}")
        seen = [
            f"{x} {y} {n + 1 if found[n, number - 10] else -1}" for n, (x, y) in enumerate(pixels[number - 10].tolist())
        ]
        lines.append("" if number == 12 else " ".join(seen))  # an image without keypoints has an empty line
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    lines = ["# points"]
    for n, (xyz, color, track) in enumerate(zip(points.tolist(), colors, tracks, strict=True)):
        seen = " ".join(f"{view} {key}" for view, key in track)
        lines.append(f"{n + 1} {' '.join(map(repr, xyz))} {' '.join(map(str, color))} 0.5 {seen}")
    (model / "points3D.txt").write_text("\n".join(lines) + "\n")
    return folder


def save_turned(file: Path, orientation: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, exif=exif)
    return pixels
