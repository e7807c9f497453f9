"""scene.ply as 3D Gaussian splatting programs write and read it.

Source: the layout of the original release (Kerbl et al. 2023), which gsplat, brush, SuperSplat and others keep: one
vertex a Gaussian, float32, colours as the constant spherical harmonic, opacity as a logit, scales as logarithms,
rotation w x y z.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.geometry.gaussians import Gaussians
from fvgen.system.doors import read_bytes
from fvgen.system.files import atomic_path, write_bytes

SH0 = 0.28209479177387814  # the constant spherical harmonic, sqrt(1 / 4 pi)
NAMES = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2"),
    *("rot_0", "rot_1", "rot_2", "rot_3"),
)
LONGEST_HEADER = 1 << 16
MOST_BYTES = 4 << 30  # a scene of ten million Gaussians with all harmonics has half of that
TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "uchar": "u1", "uint8": "u1", "int": "<i4", "short": "<i2"}


def write_splat(file: str | Path, gaussians: Gaussians) -> None:
    """Raises UserError when the disk is full."""
    logits = torch.logit(gaussians.opacities.clamp(1e-6, 1 - 1e-6))
    normals = torch.zeros_like(gaussians.means)
    turns = torch.nn.functional.normalize(gaussians.rotations, dim=-1)
    columns = [gaussians.means, normals, (gaussians.colors - 0.5) / SH0, logits[:, None], gaussians.scales.log(), turns]
    rows = torch.cat([column.detach().cpu().float() for column in columns], dim=1).contiguous().numpy()
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(gaussians)}"]
    header += [*(f"property float {name}" for name in NAMES), "end_header", ""]
    with atomic_path(Path(file)) as temporary:
        write_bytes(temporary, "\n".join(header).encode() + rows.astype("<f4").tobytes())


def read_splat(file: str | Path) -> Gaussians:
    """The Gaussians of a scene.ply; colours that depend on the direction keep their constant part.

    Raises UserError for anything else.
    """
    columns = _columns(Path(file), [name for name in NAMES if not name.startswith("n")], "a reconstruction's scene.ply")
    return Gaussians(
        _block(columns, "x", "y", "z"),
        _block(columns, "scale_0", "scale_1", "scale_2").exp(),
        _block(columns, "rot_0", "rot_1", "rot_2", "rot_3"),
        columns["opacity"].sigmoid(),
        _block(columns, "f_dc_0", "f_dc_1", "f_dc_2") * SH0 + 0.5,
    )


def read_points(file: str | Path) -> tuple[Tensor, Tensor]:
    """Points [N, 3] and colours [N, 3] in [0, 1] of a PLY file with x, y, z, red, green, blue. Raises UserError."""
    columns = _columns(Path(file), ["x", "y", "z", "red", "green", "blue"], "a file of coloured points")
    return _block(columns, "x", "y", "z"), _block(columns, "red", "green", "blue") / 255


def _block(columns: dict[str, Tensor], *names: str) -> Tensor:
    return torch.stack([columns[name] for name in names], dim=1)


def _columns(path: Path, names: list[str], wanted: str) -> dict[str, Tensor]:
    """Columns [N] of the vertices by name, float32 and finite. Raises UserError; ``wanted``: what to give instead."""
    data = read_bytes(path, MOST_BYTES, f"give {wanted}")
    head = data[:LONGEST_HEADER]
    end = head.find(b"end_header\n")
    if not head.startswith(b"ply") or end < 0:
        raise UserError(f"{path} is no PLY file; give {wanted}")
    count, fields = _layout(path, head[:end].decode("ascii", "replace").splitlines(), wanted)
    if missing := [name for name in names if name not in dict(fields)]:
        raise UserError(f"{path} has no {missing[0]}; give {wanted}")
    start, kind = end + len(b"end_header\n"), np.dtype(fields)
    if len(data) - start < count * kind.itemsize:
        raise UserError(f"{path} is cut short: {count} rows take {count * kind.itemsize} bytes; make it again")
    table = np.frombuffer(data, kind, count, start)
    columns = {name: torch.from_numpy(table[name].astype(np.float32)) for name in names}
    if not all(bool(x.isfinite().all()) for x in columns.values()):
        raise UserError(f"{path} holds NaN or infinity; make it again")
    return columns


def _layout(path: Path, lines: list[str], wanted: str) -> tuple[int, list[tuple[str, str]]]:
    """Number of vertices, and their columns."""
    if "format binary_little_endian 1.0" not in lines:
        raise UserError(f"{path} is not binary little-endian; convert it")
    words = [line.split() for line in lines]
    elements = [w for w in words if w[:1] == ["element"]]
    if not elements or elements[0][1:2] != ["vertex"] or not (len(elements[0]) == 3 and elements[0][2].isdigit()):
        raise UserError(f"{path} has no vertices first; give {wanted}")
    first = words.index(elements[0]) + 1
    last = words.index(elements[1]) if len(elements) > 1 else len(words)
    properties = [w for w in words[first:last] if w[:1] == ["property"]]
    fields = [(w[2], TYPES[w[1]]) for w in properties if len(w) == 3 and w[1] in TYPES]
    if len(fields) < len(properties) or len(dict(fields)) < len(fields):
        raise UserError(f"{path} has columns that are no plain numbers; give {wanted}")
    return int(elements[0][2]), fields
