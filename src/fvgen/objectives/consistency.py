"""Distances between two answers of a consistency function, one value per sample [B].

With r = a - b, averaged over everything but the batch:

    pseudo-Huber   sqrt(r^2 + c^2) - c      Song and Dhariwal 2023, entry by entry as in latent consistency models
    l2             r^2

Pseudo-Huber is r^2 / 2c for small r and |r| for large ones: a few entries that are far off do not rule the gradient.
"""

from __future__ import annotations

from torch import Tensor


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.001) -> Tensor:
    """[B] of a and b [B, ...]; ``c`` is where quadratic becomes linear, in their units."""
    return (((a - b).square() + c * c).sqrt() - c).flatten(1).mean(1)


def squared(a: Tensor, b: Tensor) -> Tensor:
    """[B] mean square of a - b, [B, ...]."""
    return (a - b).square().flatten(1).mean(1)
