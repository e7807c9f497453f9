"""How many floating-point operations were that?"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Work(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention inside its context, backward passes and what
    checkpointing computes again included, by torch's own formulas; a multiplication and an addition are two.

    (`torch.utils.flop_counter.FlopCounterMode` counts the same, but its module hooks keep activations alive.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out
