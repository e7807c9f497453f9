"""One iteration's clips, batch after batch, and the random numbers that go with each."""

from __future__ import annotations

import hashlib

import torch

from fvgen.distill.draws import Draws
from fvgen.distill.methods.base import Part
from fvgen.distill.settings import StageConfig
from fvgen.shards.order import ClipLoader
from fvgen.system.processes import World


def iteration_generator(seed: int, method: str, iteration: int) -> torch.Generator:
    """The random stream of one iteration."""
    digest = hashlib.sha256(f"fvgen distill {seed} {method} {iteration}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Dealer:
    """Called, it hands out this process's clips of the next global batch, in ``accumulation`` parts, from a loader that
    outlives the iteration.

    Process r of n has the r-th of n equal runs of rows, so that n processes make together the update of one. All that
    an iteration draws comes from one stream of its own, batch after batch.
    """

    def __init__(self, loader: ClipLoader, config: StageConfig, world: World, iteration: int) -> None:
        self.loader, self.config, self.world = loader, config, world
        self.generator = iteration_generator(config.run.seed, config.name, iteration)
        self.last: list[Part] = []

    def __call__(self) -> list[Part]:
        total, count = self.config.data.batch_size, self.config.memory.accumulation
        if count > 1 and self.last:  # each part drew from a copy of the stream
            self.generator.set_state(self.last[-1].draws.generator.get_state())
        size = total // (self.world.size * count)
        first = self.world.rank * size * count
        rows = [slice(first + k * size, first + (k + 1) * size) for k in range(count)]
        batches = [next(self.loader).to(self.config.run.device) for _ in rows]
        whole = Draws(self.generator, total)
        draws = [Draws(self.generator, total, rows[0])] if count == 1 else [whole.copy(part) for part in rows]
        self.last = [Part(*pair) for pair in zip(batches, draws, strict=True)]
        return self.last
