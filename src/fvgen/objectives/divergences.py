"""Table of f-divergences between teacher p and student q, as weights on the DMD gradient.

With r = p/q and D_f = integral of q f(p/q) for a convex f with f(1) = 0, the gradient for a student x = G(z)
is

    dD_f/dtheta = -E_z[ h(r) (score_p(x) - score_q(x)) dx/dtheta ],    h(r) = r^2 f''(r),

(FVGen's supplement derives the softened row; the others follow the same two lines, as in f-distill, Xu et al.
2025). So a divergence is one row: f, which only tests need, and h, written in log r so that nothing
overflows.

Constants: each f is scaled such that h carries no factor; `measures` says which multiple of the textbook
divergence that is. Such a factor only rescales the learning rate, and `RatioNormalizer` removes it.
Rows whose h grows without bound stop at exp(MAX_LOG_WEIGHT): one sample in whose ratio the discriminator
is absurdly sure must not erase a whole run. Bounded rows are exact everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fvgen.objectives.common import full_precision, row

MAX_LOG_WEIGHT = 10.0
"""Largest log of an unbounded weight; exp(10) is about 22,000."""


@dataclass(frozen=True)
class Divergence:
    """One row: f of the ratio r, its weight h(log r) = r^2 f''(r), and in words what q f(r) integrates to."""

    f: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    measures: str

    @property
    def constant(self) -> bool:
        """Whether every ratio weighs the same, so that none need be known."""
        return self.weight is torch.ones_like


def _exp(log_weight: Tensor) -> Tensor:
    return log_weight.clamp(max=MAX_LOG_WEIGHT).exp()


DIVERGENCES: dict[str, Divergence] = {
    # DMD (Yin et al. 2024), FVGen Eq. (3): every ratio weighs one.
    "reverse_kl": Divergence(lambda r: -r.log(), torch.ones_like, "KL(q||p)"),
    # FVGen Eq. (6) and supplement, h = 1/(r+1). The paper's second line of Eq. (6) is twice its first.
    "softened_reverse_kl": Divergence(
        lambda r: (r + 1) * (0.5 + 0.5 / r).log(), lambda log_r: (-log_r).sigmoid(), "2 KL((p+q)/2 || p)"
    ),
    # FVGen Eq. (8) as printed, h = 1/r. Not the divergence of Eq. (6), but one all the same: Pearson's.
    "softened_reverse_kl_printed": Divergence(
        lambda r: 0.5 / r - 0.5, lambda log_r: _exp(-log_r), "chi^2(q||p) / 2, chi^2 = integral of q^2/p - 1"
    ),
    "forward_kl": Divergence(lambda r: r * r.log(), _exp, "KL(p||q)"),
    "jensen_shannon": Divergence(
        lambda r: r * r.log() - (r + 1) * (0.5 * r + 0.5).log(),
        torch.sigmoid,
        "2 JS(p, q), JS = KL(p||m)/2 + KL(q||m)/2, m = (p+q)/2",
    ),
    "jeffreys": Divergence(lambda r: (r - 1) * r.log(), lambda log_r: 1 + _exp(log_r), "KL(p||q) + KL(q||p)"),
    "squared_hellinger": Divergence(
        lambda r: 4 - 4 * r.sqrt(),
        lambda log_r: _exp(0.5 * log_r),
        "4 H^2(p, q), H^2 = 1 - integral of sqrt(p q)",
    ),
}


def weight(name: str, log_ratio: Tensor) -> Tensor:
    """h(r) = r^2 f''(r) of the named row at log r = log_ratio [B] -> [B], >= 0, at least float32.

    log_ratio is log(p_teacher/q_student), natural logarithm; any finite value, however large, gives a finite
    weight, and NaN stays NaN. Raises ValueError for an unknown name.
    """
    return row(DIVERGENCES, name, "divergence").weight(full_precision(log_ratio))
