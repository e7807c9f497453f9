"""The processes of a run: who am I, and the few collectives that training needs. Alone, every one of them is free.

Nobody here starts processes or opens connections: `fvgen.distill.engines` does, before it makes a `World`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fvgen.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """``rank`` of ``size`` processes; ``local_rank`` counts on one machine. Collectives must be called by all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] of each process to [size * n, ...], in the order of ranks."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool, device: str | torch.device = "cpu") -> bool:
        """Whether ``flag`` is true anywhere."""
        if self.size == 1:
            return flag
        return bool(self.gather(torch.tensor([int(flag)], device=device)).sum().item())

    def tell(self, value: T) -> T:
        """The main process's ``value``, everywhere."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def main_only(self, work: Callable[[], object]) -> None:
        """Let the main process work while the others wait; its `UserError` is raised by all."""
        sentence = None
        if self.is_main:
            try:
                work()
            except UserError as error:
                if self.size == 1:
                    raise
                sentence = str(error)
        sentence = self.tell(sentence)
        if sentence is not None:
            raise UserError(sentence)

    def main_first(self, work: Callable[[], T]) -> T:
        """``work()`` of every process, the main one's before all others: it fills the caches that they read."""
        result: list[T] = []
        self.main_only(lambda: result.append(work()))
        return result[0] if result else work()


ALONE = World()
"""One process."""
