"""How well a rendered view shows the true one: distances of images and depths, one value per view [V].

    square     mean of (a - b)^2                                      colours in [0, 1]
    log depth  mean of |log(d / alpha) - log d'| where alpha > 1/2    d: depths times alpha, as rasterisers give them
    own pixels both without a rasteriser, of Gaussians that each stand for some pixels of one frame

The logarithm makes the second free of the scene's unit, and a metre at ten as dear as ten centimetres at one; the
papers' depth terms (Lyra's median-normalised one) are for depth that is known up to a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

Terms = tuple[Tensor, Tensor | None]
OPAQUE = 0.5
LEAST = 1e-3  # of a depth, in the path's units


def own_pixels(colors: Tensor, depth: Tensor, truth: Tensor, shown: Tensor, true_depth: Tensor | None) -> Terms:
    """(squared error of colours, error of the depth's logarithm or None), scalars: of a grid of Gaussians against the
    pixels of their own frame that they stand for, each g x g of them.

    ``colors`` [F, 3, H', W'] and ``depth`` [F, H', W'] of the Gaussians, ``truth`` [F, 3, g H', g W'] in [0, 1],
    ``shown`` [F, g H', g W'] and ``true_depth`` the same, 0 where it is unknown. What is not shown does not count.
    """
    g = shown.shape[-1] // depth.shape[-1]
    weight = avg_pool2d(shown[:, None].to(depth), g)
    mean = avg_pool2d(truth * shown[:, None], g) / weight.clamp(min=1e-6)
    color = ((colors - mean).square() * weight).sum() / (3 * weight.sum().clamp(min=1e-6))
    if true_depth is None:
        return color, None
    middle = true_depth[:, g // 2 :: g, g // 2 :: g]
    counts = (shown[:, g // 2 :: g, g // 2 :: g] & (middle > 0)).to(depth)
    error = (depth.clamp(min=LEAST).log() - middle.clamp(min=LEAST).log()).abs()
    return color, (error * counts).sum() / counts.sum().clamp(min=1)


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
