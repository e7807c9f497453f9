"""Random numbers of a global batch, of which each process sees its own rows.

n processes with B/n clips each must make the very update that one process makes with B. So everybody draws the numbers
of all B clips from the same stream and keeps the rows of its own clips. That costs B normal samples of the CPU's
generator per draw, milliseconds against an update's seconds, and nothing has to be sent.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Draws:
    """A stream of random numbers. ``batch`` is the global number of clips and ``rows`` are the own ones among them; by
    default the clips at hand are the whole batch."""

    def __init__(self, generator: torch.Generator, batch: int | None = None, rows: slice = slice(None)) -> None:
        self.generator, self.batch, self.rows = generator, batch, rows

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape [b, ...] of ``like``."""
        shape = (self.batch or like.shape[0], *like.shape[1:])
        return torch.randn(shape, generator=self.generator)[self.rows].to(like.device, non_blocking=True)

    def integers(self, low: int, high: int, like: Tensor) -> Tensor:
        """[b] integers low..high-1, one per row of ``like`` [b, ...]."""
        size = (self.batch or like.shape[0],)
        return torch.randint(low, high, size, generator=self.generator)[self.rows].to(like.device, non_blocking=True)

    def shared_integer(self, high: int) -> int:
        """One integer 0..high-1 for all clips and processes. It never touches the device: no synchronisation."""
        return int(torch.randint(high, (), generator=self.generator))

    def copy(self, rows: slice | None = None) -> Draws:
        """The same numbers once more, for the same or for other rows."""
        generator = torch.Generator().manual_seed(0)
        generator.set_state(self.generator.get_state())
        return Draws(generator, self.batch, self.rows if rows is None else rows)
