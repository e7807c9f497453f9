"""Bringing a network's depth to the scale of given poses, by points whose true depth is known."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 12  # points: below it a shift cannot be told from noise
ROUNDS = 30


def align_inverse_depth(inverse: Tensor, depth: Tensor, shift: bool = True) -> tuple[float, float]:
    """(a, b) such that a * inverse + b is about 1 / depth; both [M], positive.

    Least sum of absolute *relative* errors, |(a x + b) d - 1|, by iteratively reweighted least squares from the median
    of the ratios: a minority of wrong points hardly moves it. A network's inverse depth is right up to scale and shift
    (Ranftl et al. 2020); with fewer than `FEW` points, or where a would not be positive, b is 0.
    """
    x, d = inverse.double(), depth.double()
    scale = (1 / (x * d)).median().item()
    if not shift or len(x) < FEW:
        return scale, 0.0
    rows = torch.stack([x * d, d], dim=1)
    solution = rows.new_tensor([scale, 0.0])
    for _ in range(ROUNDS):
        weight = ((rows @ solution - 1).abs() + 1e-4).rsqrt()
        normal = (rows * weight[:, None]).T @ (rows * weight[:, None])
        normal += 1e-12 * normal.diagonal().max() * torch.eye(2, dtype=normal.dtype, device=normal.device)
        solution = torch.linalg.solve(normal, (rows * (weight**2)[:, None]).sum(0))
    a, b = solution.tolist()
    return (a, b) if a > 0 else (scale, 0.0)
