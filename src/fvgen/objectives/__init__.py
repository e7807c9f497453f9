"""The losses of FVGen as pure functions of tensors: one value per sample, no network, no config, no rank.

`gan` (stage 1), `dmd` and `divergences` (stage 2), `ratio` (the two objects with state:
the weight's normaliser, a relativistic logit's constant). They depend on torch alone. Letters: B batch; "..." any
further axes, the same for all arguments.
"""

from fvgen.objectives.divergences import DIVERGENCES, weight
from fvgen.objectives.dmd import denoising_loss, dmd_gradient, dmd_loss, score_difference
from fvgen.objectives.gan import approximate_r1, discriminator_loss, generator_loss, r1
from fvgen.objectives.ratio import RatioConstant, RatioNormalizer, log_ratio

__all__ = [
    "DIVERGENCES",
    "RatioConstant",
    "RatioNormalizer",
    "approximate_r1",
    "denoising_loss",
    "discriminator_loss",
    "dmd_gradient",
    "dmd_loss",
    "generator_loss",
    "log_ratio",
    "r1",
    "score_difference",
    "weight",
]
