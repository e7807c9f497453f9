"""COLMAP's sparse models as text, written: cameras.txt, images.txt, points3D.txt. Source: COLMAP documentation, "Output
Format". (`colmap_files` reads them.)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fvgen.geometry.cameras import Cameras
from fvgen.geometry.conventions import to_colmap
from fvgen.system.files import new_folder, write_text

Tracks = tuple[Tensor, Tensor, Tensor]  # of M observations: point [M], view [M], pixel [M, 2]


def write_model(
    folder: Path, cameras: Cameras, names: Sequence[str], points: Tensor, colors: Tensor, tracks: Tracks
) -> None:
    """A model of V views (a PINHOLE camera each where lenses differ, else one) in the new folder ``folder``.

    names: of the V images, relative to the scene's folder ``images``. points: [N, 3] in the world; colors: [N, 3] in
    [0, 1].
    """
    new_folder(folder)
    views = to_colmap(cameras.to(dtype=torch.float64))
    lenses = [tuple(row) for row in views.params.tolist()]
    number = {lens: place for place, lens in enumerate(dict.fromkeys(lenses), start=1)}
    size = f"{cameras.width} {cameras.height}"
    lines = [f"{place} PINHOLE {size} {_numbers(lens)}" for lens, place in number.items()]
    _write(folder / "cameras.txt", "CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]", lines)

    point, view, pixel = tracks
    seen: list[list[str]] = [[] for _ in names]
    track: list[list[str]] = [[] for _ in range(len(points))]
    for p, v, (x, y) in zip(point.tolist(), view.tolist(), pixel.double().tolist(), strict=True):
        track[p].append(f"{v + 1} {len(seen[v])}")
        seen[v].append(f"{x:.4f} {y:.4f} {p + 1}")
    lines = []
    for v, (name, lens) in enumerate(zip(names, lenses, strict=True)):
        pose = [*views.quaternion[v].tolist(), *views.translation[v].tolist()]
        lines += [f"{v + 1} {_numbers(pose)} {number[lens]} {name}", " ".join(seen[v])]
    _write(folder / "images.txt", "IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME; then X, Y, POINT3D_ID", lines)

    shades = (colors.clamp(0, 1) * 255).round().long().tolist()
    lines = [
        f"{p + 1} {_numbers(xyz)} {' '.join(map(str, shade))} 0 {' '.join(track[p])}".rstrip()
        for p, (xyz, shade) in enumerate(zip(points.double().tolist(), shades, strict=True))
    ]
    _write(folder / "points3D.txt", "POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)", lines)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.12g}" for value in values)


def _write(file: Path, header: str, lines: list[str]) -> None:
    write_text(file, "".join(f"{line}\n" for line in [f"# {header}", *lines]))
