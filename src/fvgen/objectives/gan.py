"""Adversarial losses on logits, one value per sample.

Sign: a positive logit says real. FVGen's Eq. (5) as printed makes f the probability of fake while its Eq. (7)
needs that of real; here everything follows Eq. (7), so that at the optimum the logit is
log(p_teacher/q_student). Logits are [B, ...]; each one is judged by itself (a clip has many, one per patch),
then a sample's are averaged.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fvgen.objectives.common import full_precision, row, sample_mean


@dataclass(frozen=True)
class AdversarialKind:
    """One row: the generator's loss of (fake, real) logits and the discriminator's loss of (real, fake)
    logits."""

    generator: Callable[[Tensor, Tensor | None], Tensor]
    discriminator: Callable[[Tensor, Tensor], Tensor]
    paired: bool
    """Whether the generator's loss also looks at the real logits."""


KINDS: dict[str, AdversarialKind] = {
    # Goodfellow et al. 2014, section 3, with logits: -log f(fake), and -log f(real) - log(1 - f(fake)).
    "non_saturating": AdversarialKind(
        lambda fake, real: softplus(-fake), lambda real, fake: softplus(-real) + softplus(fake), paired=False
    ),
    # Jolicoeur-Martineau 2018: only the difference of a pair counts, so the logit is log r up to a
    # constant, which `fvgen.objectives.ratio.RatioConstant` finds.
    "relativistic": AdversarialKind(
        lambda fake, real: softplus(real - fake), lambda real, fake: softplus(fake - real), paired=True
    ),
}


def generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None, kind: str = "non_saturating") -> Tensor:
    """How little the discriminator takes the student's samples for real: fake_logits [B, ...] -> [B], >= 0.

    real_logits [B, ...] are needed by kind="relativistic" and refused otherwise (they could have no effect).
    Raises ValueError for an unknown kind, or where real_logits are missing or superfluous.
    """
    losses = row(KINDS, kind, "kind of adversarial loss")
    if losses.paired != (real_logits is not None):
        raise ValueError(f"The generator loss of kind '{kind}' {'needs' if losses.paired else 'takes no'} real_logits.")
    real = None if real_logits is None else full_precision(real_logits)
    return sample_mean(losses.generator(full_precision(fake_logits), real))


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "non_saturating") -> Tensor:
    """How badly logits [B, ...] of real and of fake samples tell them apart -> [B], >= 0; 2 log 2 when
    clueless.

    (log 2 for kind="relativistic".) Raises ValueError for an unknown kind.
    """
    assert real_logits.shape == fake_logits.shape
    losses = row(KINDS, kind, "kind of adversarial loss")
    return sample_mean(losses.discriminator(full_precision(real_logits), full_precision(fake_logits)))


def approximate_r1(logits_noised: Tensor, logits_perturbed: Tensor, sigma: float) -> Tensor:
    """Finite-difference gradient penalty [B] >= 0 from logits [B, ...] of x_t and of x_t + sigma * noise.

    The perturbed input starts from the *noised* sample, the very one that logits_noised judges: perturbing
    the clean sample instead compares two noise levels, and the penalty is not 0 at perturbation 0. Divided by
    sigma^2 its mean over standard normal noise tends to |d logit/dx_t|^2 as sigma -> 0, averaged over the
    logits of a sample, and equals it at any sigma where the logit is linear. No second derivatives: works
    under any sharding. (Approximate R1, Lin et al. 2025, "Diffusion adversarial post-training", without their
    absorbed scale.)
    """
    assert logits_noised.shape == logits_perturbed.shape and sigma > 0
    return sample_mean((full_precision(logits_perturbed) - full_precision(logits_noised)).square()) / sigma**2


def r1(logits: Tensor, x_t: Tensor) -> Tensor:
    """Exact gradient penalty |d mean logit / dx_t|^2 [B] from logits [B, ...] that depend on x_t [B, ...].

    Mescheder et al. 2018, R1 (without the factor 1/2). Differentiable once more: costs a double backward.
    With several logits per sample this is the gradient of their mean, never more than what `approximate_r1`
    estimates.
    """
    (gradient,) = torch.autograd.grad(sample_mean(logits).sum(), x_t, create_graph=True)
    return full_precision(gradient).square().reshape(len(x_t), -1).sum(dim=1)
