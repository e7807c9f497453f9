"""Averaged weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """An exponential moving average of a module's parameters; ``module`` is a copy that holds it.

    The decay is constant. The usual warm-up, (1 + n) / (10 + n), is for networks that start at random: it forgets the
    start by averaging over n / 9 updates only, while a student starts as its teacher, and that is worth remembering.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Move the average towards ``source``."""
        torch._foreach_lerp_(list(self.module.parameters()), list(source.parameters()), 1 - self.decay)

    def state_dict(self) -> dict:
        return {"module": self.module.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["module"])
