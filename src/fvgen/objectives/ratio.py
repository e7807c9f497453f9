"""From a discriminator's logits to a weight per sample that is still a weight at micro-batch 1."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fvgen.objectives.common import full_precision, sample_mean

TINY = 1e-8
"""Smallest mean to divide by: guards against 0/0 where every weight has underflowed."""


def log_ratio(logits: Tensor) -> Tensor:
    """log(p_teacher/q_student) [B] from logits [B, ...] with real = positive: their mean, without a graph.

    FVGen Eq. (7), with f the probability of *real* (its Eq. (5) has the opposite sign): r = f/(1-f) =
    exp(logit).
    """
    return sample_mean(logits.detach())


class RatioNormalizer(nn.Module):
    """Divides weights h by their running mean, kept per bin of timesteps; never by the batch at hand.

    h depends on the noise level: where noise hides the difference all ratios are one, near clean samples they
    spread over decades. Dividing by the mean of a bin keeps the step size comparable between bins and
    divergences. Dividing by the mean of the *current batch* would turn the weight of a lone sample into
    exactly one, that is, any divergence into reverse KL.

    Each bin holds decayed sums of weights and of sample counts, so its mean needs no bias correction. It
    starts as `prior` observations of `initial`, which later ones wash out; the weight at log r = 0, where
    student and teacher agree, is a good `initial`. The sums are buffers: `state_dict` saves them. Nothing
    here waits for the device.

    A batch is divided by one state and then added as a whole, so splitting it into micro-batches gives
    slightly other numbers: later parts are divided by means that know the earlier ones. Processes share the
    means through `normalize`'s ``gather``.
    """

    def __init__(
        self,
        initial: float = 1.0,
        bins: int = 10,
        decay: float = 0.99,
        prior: float = 4.0,
        timesteps: int = 1000,
    ) -> None:
        super().__init__()
        assert initial > 0 and prior > 0 and 0 < decay < 1 and 0 < bins <= timesteps
        self.bins, self.decay, self.timesteps = bins, decay, timesteps
        self.weight_sum: Tensor
        self.sample_sum: Tensor
        self.register_buffer("weight_sum", torch.full((bins,), float(prior * initial)))
        self.register_buffer("sample_sum", torch.full((bins,), float(prior)))

    def mean(self, t: Tensor) -> Tensor:
        """Running mean of h [B] in the bins of timesteps t [B], integers in 0..timesteps-1."""
        index = self._bin(t)
        return self.weight_sum[index] / self.sample_sum[index].clamp(min=TINY)

    @torch.no_grad()
    def update(self, h: Tensor, t: Tensor) -> None:
        """Adds weights h [B] seen at timesteps t [B]; h that is not finite is left out."""
        assert h.shape == t.shape and h.ndim == 1
        index, finite = self._bin(t), h.isfinite()
        value = torch.where(finite, h, 0).to(self.weight_sum.dtype)
        new = torch.zeros_like(self.sample_sum).index_add_(0, index, finite.to(self.sample_sum.dtype))
        keep = self.decay**new
        self.weight_sum.mul_(keep).index_add_(0, index, value)
        self.sample_sum.mul_(keep).add_(new)

    @torch.no_grad()
    def normalize(self, h: Tensor, t: Tensor, gather: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """h [B] at timesteps t [B], divided by the mean that earlier calls left -> [B]; then h joins the
        mean. ``gather`` [B, ...] -> [n B, ...] makes that the h and t of all processes, in the same order
        everywhere; it is called once."""
        normalized = full_precision(h) / self.mean(t).clamp(min=TINY)
        if gather is not None:
            h, t = gather(torch.stack([full_precision(h), t], dim=1)).unbind(1)  # float32 holds every timestep
        self.update(h, t)
        return normalized

    def _bin(self, t: Tensor) -> Tensor:
        return _bin(t, self.bins, self.timesteps)


class RatioConstant(nn.Module):
    """What a relativistic head's logit has on top of log r, by bins of timesteps.

    Such a head only ever sees differences of logits, so that it ends at log r + c(t) with any c; but h(r) needs r
    itself. That r = p/q makes c known: for every c0, as both are integrals of p (Bennett 1976, acceptance ratio),

        exp(c - c0) = E_q[sigmoid(logit - c0)] / E_p[sigmoid(c0 - logit)].

    Near c0 = c no other such ratio of means has less variance, and nothing in it is above one. (E_q[exp(logit)] =
    exp(c) is another, whose mean a rare sample makes.) Where it holds with c0 = c, the constant is also where an
    absolute head of this logit's shape would stand: it minimises E_p[softplus(c - logit)] +
    E_q[softplus(logit - c)].

    Each bin keeps c and the decayed sum of the denominators, which is that of the numerators as well once c has taken
    their ratio in; old pairs count by the c0 of their time, which the equation allows. It starts at c = 0 with
    ``prior`` pairs' weight. Both are buffers, and nothing waits for the device.
    """

    def __init__(self, bins: int = 10, decay: float = 0.99, prior: float = 4.0, timesteps: int = 1000) -> None:
        super().__init__()
        assert prior > 0 and 0 < decay < 1 and 0 < bins <= timesteps
        self.bins, self.decay, self.timesteps = bins, decay, timesteps
        self.constant: Tensor
        self.overlap: Tensor
        self.register_buffer("constant", torch.zeros(bins))
        self.register_buffer("overlap", torch.full((bins,), prior / 2))  # sigmoid(0) each

    def at(self, t: Tensor) -> Tensor:
        """The constant c [B] in the bins of timesteps t [B], integers in 0..timesteps-1."""
        return self.constant[_bin(t, self.bins, self.timesteps)]

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor, t: Tensor, gather: Callable[[Tensor], Tensor] | None = None) -> None:
        """Adds pairs of logits [B] of real and of fake samples, of which each shares its timestep t [B]. A pair that is
        not finite is left out. ``gather`` as in `RatioNormalizer.normalize`."""
        assert real.shape == fake.shape == t.shape and real.ndim == 1
        if gather is not None:
            real, fake, t = gather(torch.stack([real, fake, t], dim=1)).unbind(1)
        index = _bin(t, self.bins, self.timesteps)
        c, finite = self.constant[index], real.isfinite() & fake.isfinite()
        new, above, below = (
            torch.zeros_like(self.overlap).index_add_(0, index, torch.where(finite, x, 0).to(self.overlap.dtype))
            for x in (torch.ones_like(c), (fake - c).sigmoid(), (c - real).sigmoid())
        )
        kept = self.decay**new * self.overlap
        self.constant.add_((kept + above).clamp(min=TINY).log() - (kept + below).clamp(min=TINY).log())
        self.overlap.copy_(kept + below)


def _bin(t: Tensor, bins: int, timesteps: int) -> Tensor:
    return t.long() * bins // timesteps
