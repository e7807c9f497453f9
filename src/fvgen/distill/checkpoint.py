"""A checkpoint is a folder with one file per named thing that has state, and a list of checksums; whole or absent.

Files hold tensors and plain containers, never code, and whole tensors by name: how many processes wrote them, or read
them again, leaves no trace.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fvgen.errors import UserError, first_problem, short
from fvgen.system.doors import Unreadable, plain_tensors, problem, read_object, read_state
from fvgen.system.files import TEMPORARY, atomic_path, move_away, new_folder, recover, write_json, write_state
from fvgen.system.places import sha256_of
from fvgen.system.processes import ALONE, World

INDEX = "checkpoint.json"
FORMAT = 1


class Index(BaseModel):
    """``checkpoint.json``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[1]
    iteration: int = Field(ge=0)
    facts: dict[str, Any]
    sha256: dict[Annotated[str, Field(pattern=r"^\w+\.pt$")], Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]


class Stateful(Protocol):
    """Anything with the two methods that torch modules have. With several processes all must call `state_dict`, and the
    main one's result counts."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def save_checkpoint(
    folder: Path,
    iteration: int,
    things: Mapping[str, Stateful],
    facts: Mapping[str, Any] | None = None,
    world: World = ALONE,
) -> None:
    """Write ``things`` as they stand after ``iteration``; ``facts`` say whose they are. Raises UserError when the disk
    is full. One thing is in memory at a time."""
    states = ((name, thing.state_dict()) for name, thing in things.items())

    def write() -> None:
        with atomic_path(folder) as temporary:
            new_folder(temporary)
            checksums = {}
            for name, state in states:
                file = temporary / f"{name}.pt"
                write_state(file, state)
                checksums[file.name] = checksum(file)
            index = {"format": FORMAT, "iteration": iteration, "facts": dict(facts or {}), "sha256": checksums}
            write_json(temporary / INDEX, index)

    def write_or_go_along() -> None:
        try:
            write()
        except UserError:
            _use_up(states)  # the other processes are in the collectives of the things that follow
            raise

    if not world.is_main:
        _use_up(states)
    world.main_only(write_or_go_along)


def _use_up(states: Iterable[object]) -> None:
    deque(states, maxlen=0)


def load_checkpoint(
    folder: Path,
    things: Mapping[str, Stateful],
    facts: Mapping[str, Any] | None = None,
    world: World = ALONE,
) -> int:
    """Restore ``things`` in place and return the iteration.

    Raises UserError for a checkpoint that is damaged (every checksum is verified first, by the main process alone: the
    files are tens of gigabytes), of another run (``facts`` differ) or of other networks.
    """
    cure = f"delete {folder} to start from an earlier one or again, or choose another output folder"
    index = read_index(folder, cure)
    for key, mine in (facts or {}).items():
        theirs = index["facts"].get(key)
        if theirs != mine:
            raise UserError(f"checkpoint {folder} is of another {key} ({theirs!r} there, {mine!r} here); {cure}")
    if index["sha256"].keys() != {f"{name}.pt" for name in things}:
        raise UserError(f"checkpoint {folder} does not fit this run's networks; {cure}")

    def verify() -> None:
        for name, expected in index["sha256"].items():
            _verify(folder / name, expected, cure)

    world.main_only(verify)
    for name, thing in things.items():
        try:
            thing.load_state_dict(_read(folder / f"{name}.pt", cure))
        except UserError:
            raise  # the file itself is bad
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(f"checkpoint {folder} does not fit this run's networks; {cure}") from error
    return index["iteration"]


def load_checkpoint_part(folder: Path, name: str) -> dict[str, Any]:
    """The verified state of one thing. Raises UserError for a damaged checkpoint."""
    cure = "choose another one"
    _verify(folder / f"{name}.pt", read_index(folder, cure)["sha256"].get(f"{name}.pt", ""), cure)
    return _read(folder / f"{name}.pt", cure)


def load_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights of an average. Raises UserError for a checkpoint without."""
    weights = load_checkpoint_part(folder, name).get("module")
    if not isinstance(weights, dict) or not weights or (wrong := plain_tensors(weights)):
        reason = wrong if weights and isinstance(weights, dict) else "there are none"
        raise UserError(f"checkpoint {folder} holds no weights in {name}.pt ({reason}); choose another one")
    return weights


def _verify(file: Path, expected: str, cure: str) -> None:
    if problem(file) or checksum(file) != expected:
        raise UserError(
            f"checkpoint {file.parent} is damaged or cut short ({file.name} is missing or not what was written); {cure}"
        )


def _read(file: Path, cure: str) -> dict[str, Any]:
    try:
        state = read_state(file)
    except Unreadable as error:
        raise UserError(f"checkpoint {file.parent} is damaged or cut short ({error.reason}); {cure}") from error
    wrong = state_problem(state) if isinstance(state, dict) else f"it holds {type(state).__name__}"
    if wrong:
        raise UserError(f"checkpoint {file.parent} ({file.name}: {wrong}) does not fit this run's networks; {cure}")
    return state


def state_problem(state: Any, depth: int = 0) -> str | None:
    """What is in a state that no thing of ours writes, in words; None for nothing: it holds texts, finite numbers,
    plain tensors, and mappings and lists of these, under names."""
    if depth > 8:
        return "it is nested too deeply"
    if isinstance(state, Mapping):
        if wrong := next((key for key in state if not isinstance(key, str)), None):
            return f"a name is {short(wrong)}, no text"
        weights = depth and state and all(isinstance(value, torch.Tensor) for value in state.values())
        if weights and all(value.is_floating_point() for value in state.values()):
            return plain_tensors(state)
        return next((found for value in state.values() if (found := state_problem(value, depth + 1))), None)
    if isinstance(state, list | tuple):
        return next((found for value in state if (found := state_problem(value, depth + 1))), None)
    if isinstance(state, torch.Tensor):
        plain = state.layout is torch.strided and not state.is_quantized and state.device.type == "cpu"
        return None if plain else "it holds a tensor without plain values"
    if isinstance(state, float) and not math.isfinite(state):
        return f"it holds {state}"
    return None if state is None or isinstance(state, str | bool | int | float) else f"it holds {type(state).__name__}"


def read_index(folder: Path, cure: str) -> dict[str, Any]:
    """The judged content of a checkpoint's list of files."""
    try:
        return Index.model_validate(read_object(folder / INDEX)).model_dump()
    except Unreadable as error:
        raise UserError(f"checkpoint {folder} is damaged or cut short ({error.reason}); {cure}") from None
    except ValidationError as error:
        reason = first_problem(error)
        raise UserError(f"checkpoint {folder} is damaged or of another version of fvgen ({reason}); {cure}") from None


def checksum(file: Path) -> str:
    """sha256, in hex digits."""
    return sha256_of(file)


class CheckpointFolder:
    """Checkpoints by iteration: the newest ``keep``, and the one with the lowest score where there are scores."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep

    def path(self, iteration: int) -> Path:
        return self.root / f"{iteration:08d}"

    def iterations(self) -> list[int]:
        """Ascending; half-written ones do not count."""
        names = [path.name for path in self.root.iterdir()] if self.root.is_dir() else []
        return sorted(int(name) for name in names if re.fullmatch(r"\d{8}", name))

    def newest(self) -> Path | None:
        """The one to resume from."""
        iterations = self.iterations()
        return self.path(iterations[-1]) if iterations else None

    def clean(self) -> None:
        """Remove what a kill while saving left behind."""
        for path in list(self.root.glob(f"*{TEMPORARY}*")) if self.root.is_dir() else []:
            recover(path.with_name(path.name.partition(TEMPORARY)[0]))

    def prune(self, scores: Mapping[int, float]) -> None:
        """Delete all but the newest and the best; only whole checkpoints stay."""
        iterations = self.iterations()
        best = min((i for i in iterations if i in scores), key=lambda i: scores[i], default=None)
        for iteration in iterations[: -self.keep]:
            if iteration != best:
                move_away(self.path(iteration))
