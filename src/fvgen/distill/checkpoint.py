"""A checkpoint is a dictionary of named things that have state, in one file that is either whole or absent."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Protocol

import torch

from fvgen.errors import UserError, first_line
from fvgen.storage import atomic_path


class Stateful(Protocol):
    """Anything with the two methods that torch modules have."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def save_checkpoint(file: Path, iteration: int, things: dict[str, Stateful]) -> None:
    """Write ``things`` as they stand after ``iteration``. Raises UserError when the disk is full."""
    with atomic_path(file) as temporary:
        torch.save({"iteration": iteration, **{name: thing.state_dict() for name, thing in things.items()}}, temporary)


def load_checkpoint(file: Path, things: dict[str, Stateful]) -> int:
    """Restore ``things`` in place and return the iteration; raises UserError for a damaged or foreign checkpoint.

    Read with ``weights_only``: tensors and plain containers, never code.
    """
    cure = f"delete {file} to start this stage again, or choose another out=DIR"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        raise UserError(f"checkpoint {file} is damaged or cut short ({reason}); {cure}") from error
    try:
        iteration = int(state.pop("iteration"))
        for name, thing in things.items():
            thing.load_state_dict(state[name])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"checkpoint {file} does not fit this run's networks; {cure}") from error
    return iteration
