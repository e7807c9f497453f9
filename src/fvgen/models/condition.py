"""What a clip is generated from: tensors by name, and nothing else.

A family decides the names and how its network takes them; everybody else moves, selects and stores them unseen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

CAMERA_PATH = "camera_path"
"""The name of what a model that is guided by cameras looks at: [B, F, 21], see `fvgen.geometry.plucker.packed`."""


class Condition(Mapping[str, Tensor]):
    """Tensors [B, ...] of a batch of clips; one of a single row, [1, ...], holds for all of them.

    ``Condition(render_latents=..., text_tokens=...)``; what is None is left out. ``condition["text_tokens"]`` is the
    tensor as it was given.
    """

    def __init__(self, **tensors: Tensor | None) -> None:
        self._tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Condition({', '.join(f'{name}: {list(tensor.shape)}' for name, tensor in self.items())})"

    @property
    def clips(self) -> int:
        """B."""
        return max(tensor.shape[0] for tensor in self.values())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Condition:
        """The same on another device."""
        return Condition(**{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.items()})

    def rows(self, chosen: slice | Tensor | Sequence[int]) -> Condition:
        """The condition of some of the clips; what holds for all stays one row."""
        return Condition(**{name: x if x.shape[0] == 1 else x[chosen] for name, x in self.items()})

    def replaced(self, others: Mapping[str, Tensor]) -> Condition:
        """With other tensors under some of the names."""
        return Condition(**{**self, **others})

    def without(self, name: str) -> Condition:
        """The other tensors."""
        return Condition(**{own: tensor for own, tensor in self.items() if own != name})

    def expanded(self, clips: int) -> Condition:
        """Every tensor with a row for each of so many clips."""
        return Condition(**{name: x.expand(clips, *x.shape[1:]) for name, x in self.items()})


def joined(conditions: Sequence[Condition]) -> Condition:
    """Several conditions of as many clips each, of the same names, one batch after the other."""
    clips = max(condition.clips for condition in conditions)
    rows = [condition.expanded(clips) for condition in conditions]
    return Condition(**{name: torch.cat([row[name] for row in rows]) for name in conditions[0]})
