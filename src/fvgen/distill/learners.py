"""A network that learns: its name, its engine, and the average of its weights where one is kept."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fvgen.distill.ema import EMA
from fvgen.distill.engines import Engine, make_engine
from fvgen.distill.settings import Optimizer
from fvgen.models.denoiser import frozen
from fvgen.system.processes import World

if TYPE_CHECKING:
    from fvgen.distill.settings import StageConfig


@dataclass(frozen=True)
class Learner:
    """``engine`` updates ``module``'s parameters as ``optimizer`` says; ``average`` follows them, and is then what is
    exported."""

    name: str
    module: nn.Module
    engine: Engine
    optimizer: Optimizer
    average: EMA | None = None

    def begin(self, iteration: int, total: int) -> None:
        """Take the rate of the iteration numbered 1 to ``total``."""
        self.engine.set_rate(self.optimizer.rate(iteration, total))

    def update(self, loss: Tensor) -> Tensor | None:
        """One step down the gradient of the scalar ``loss``; see `Engine.update`."""
        return self.engine.update(loss)

    def frozen(self) -> AbstractContextManager[nn.Module]:
        """`fvgen.models.denoiser.frozen`: the backward pass of another network's loss leaves no gradient here, which
        DeepSpeed would take for a part of the module's own update."""
        return frozen(self.module)


def make_learner(
    config: StageConfig,
    world: World,
    name: str,
    module: nn.Module,
    average: bool = False,
    start_at: Mapping[str, Tensor] | None = None,
) -> Learner:
    """A network with the engine and the optimiser that the settings ask for.

    ``average``: keep the average of its weights. ``start_at``: named float32 weights that it was rounded from.
    """
    optimizer = config.optim[name]
    engine = make_engine(module, optimizer, config, world)
    if start_at:
        engine.start_at(start_at)
    return Learner(name, module, engine, optimizer, EMA(engine, config.method.ema_decay) if average else None)
