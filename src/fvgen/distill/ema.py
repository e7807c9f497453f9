"""Averaged weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fvgen.distill.engines import Engine


class EMA:
    """An exponential moving average of an engine's float32 master weights, sharded as they are.

    The decay is constant. The usual warm-up, (1 + n) / (10 + n), is for networks that start at random: it forgets the
    start by averaging over n / 9 updates only, while a student starts as its teacher, and that is worth remembering.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.shards = [master.detach().clone() for master in engine.masters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights."""
        torch._foreach_lerp_(self.shards, [master.detach() for master in self.engine.masters], 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        """Whole averaged tensors by parameter name, on the CPU of the main process; every process must call this."""
        return self.engine.gather(self.shards)

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.weights()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shards = self.engine.scatter(state["module"])
