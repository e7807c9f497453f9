"""The critic: whose features, which taps, and the head that learns on them.

FVGen, section 4.1: the teacher's middle block sees the noised clip, the head tells real from fake. Only the head
learns. The network is cut at the last tap, so nothing behind it is computed or kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fvgen.models.condition import Condition
from fvgen.models.denoiser import Denoiser


@dataclass(frozen=True)
class Critic:
    """``source``: whose features, the frozen teacher's or the fake score's; ``taps``: which; ``head``: (*features) ->
    logits [B, ...], positive for real."""

    source: Denoiser
    taps: tuple[str, ...]
    head: nn.Module

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        """Features of noised clips x_t [B, C, F, h, w] at timesteps t [B], one tensor a tap."""
        return self.source.features(x_t, t, condition, self.taps)

    def logits(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits [B, ...] of noised clips x_t [B, C, F, h, w] at timesteps t [B]."""
        return self.head(*self.features(x_t, t, condition))
