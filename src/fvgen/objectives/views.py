"""How well a rendered view shows the true one: distances of images and depths, one value per view [V].

    square     mean of (a - b)^2                                      colours in [0, 1]
    log depth  mean of |log(d / alpha) - log d'| where alpha > 1/2    d: depths times alpha, as rasterisers give them

The logarithm makes the second free of the scene's unit, and a metre at ten as dear as ten centimetres at one; the
papers' depth terms (Lyra's median-normalised one) are for depth that is known up to a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPAQUE = 0.5
LEAST = 1e-3  # of a depth, in the path's units


def square(shown: Tensor, truth: Tensor) -> Tensor:
    """[V] of images [V, 3, H, W]."""
    return (shown - truth).square().flatten(1).mean(1)


def log_depth(depth: Tensor, alpha: Tensor, truth: Tensor) -> Tensor:
    """[V] of ``depth`` and ``alpha`` [V, 1, H, W] and true depth [V, H, W]; pixels with less alpha, or without a true
    depth (0), do not count, and a view without others is 0."""
    counts = (alpha[:, 0] > OPAQUE) & (truth > 0)
    found = (depth[:, 0] / alpha[:, 0].clamp(min=OPAQUE)).clamp(min=LEAST).log()
    error = torch.where(counts, (found - truth.clamp(min=LEAST).log()).abs(), 0.0)
    return error.flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)
