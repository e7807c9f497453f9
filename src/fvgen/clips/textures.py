"""Procedural surface textures: pure functions of surface coordinates in metres, seeded by integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Texture:
    """One surface's look. ``scale`` is the size of a cell in metres; colours are RGB in [0, 1]."""

    pattern: str
    scale: float
    colors: Tensor  # [2, 3]
    grain: float
    seed: int


def lattice_hash(x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Pseudo-random values in [0, 1), one per integer cell: a multiply-xorshift hash in int64."""
    value = (x * 374761393 + y * 668265263 + seed * 2246822519) & 0x7FFFFFFF
    value = ((value ^ (value >> 13)) * 1274126177) & 0x7FFFFFFF
    return ((value ^ (value >> 16)) & 0xFFFFFF).float() / 0x1000000


def value_noise(uv: Tensor, seed: int) -> Tensor:
    """Smooth noise in [0, 1): [..., 2] -> [...], random values on the integer lattice, smoothstep between them."""
    cell = uv.floor()
    fraction = uv - cell
    fraction = fraction * fraction * (3 - 2 * fraction)
    x, y = cell.long().unbind(-1)
    a, b = lattice_hash(x, y, seed), lattice_hash(x + 1, y, seed)
    c, d = lattice_hash(x, y + 1, seed), lattice_hash(x + 1, y + 1, seed)
    fx, fy = fraction.unbind(-1)
    return torch.lerp(torch.lerp(a, b, fx), torch.lerp(c, d, fx), fy)


def fractal_noise(uv: Tensor, seed: int, octaves: int = 3) -> Tensor:
    """Sum of value noises, each octave twice as fine and half as strong, scaled back to [0, 1)."""
    total = sum(value_noise(uv * 2**k, seed + k) * 0.5**k for k in range(octaves))
    return total / (2 - 0.5 ** (octaves - 1))


def _checker(uv: Tensor, seed: int) -> Tensor:
    return (uv.floor().sum(-1) % 2).float()


def _stripes(uv: Tensor, seed: int) -> Tensor:
    return ((uv[..., 0] % 1) < 0.3 + 0.4 * (seed % 7) / 7).float()


def _bricks(uv: Tensor, seed: int) -> Tensor:
    row = (uv[..., 1] * 2).floor()
    u = uv[..., 0] + 0.5 * (row % 2)
    mortar = ((u % 1) < 0.08) | ((uv[..., 1] * 2 % 1) < 0.16)
    tone = 0.45 + 0.55 * lattice_hash(u.floor().long(), row.long(), seed)
    return torch.where(mortar, torch.zeros_like(tone), tone)


def _tiles(uv: Tensor, seed: int) -> Tensor:
    grout = ((uv % 1) < 0.07).any(-1)
    tone = lattice_hash(*uv.floor().long().unbind(-1), seed)
    return torch.where(grout, torch.zeros_like(tone), tone)


def _dots(uv: Tensor, seed: int) -> Tensor:
    return ((uv % 1 - 0.5).square().sum(-1) < 0.1).float()


def _wood(uv: Tensor, seed: int) -> Tensor:
    wobble = fractal_noise(uv * uv.new_tensor([0.7, 0.15]), seed)
    return 0.5 + 0.5 * torch.sin(12 * (uv[..., 0] * 0.5 + 1.5 * wobble))


def _marble(uv: Tensor, seed: int) -> Tensor:
    return fractal_noise(uv, seed, octaves=4)


PATTERNS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "checker": _checker,
    "stripes": _stripes,
    "bricks": _bricks,
    "tiles": _tiles,
    "dots": _dots,
    "wood": _wood,
    "marble": _marble,
}


def color_at(texture: Texture, uv: Tensor) -> Tensor:
    """Surface coordinates [M, 2] in metres to RGB [M, 3] in [0, 1]."""
    blend = PATTERNS[texture.pattern](uv / texture.scale, texture.seed)
    color = torch.lerp(texture.colors[0], texture.colors[1], blend[..., None])
    grain = fractal_noise(uv * 1.5, texture.seed + 17) - 0.5
    return (color * (1 + texture.grain * grain[..., None])).clamp(0, 1)
