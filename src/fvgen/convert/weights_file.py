"""Checkpoints of other projects: names and shapes at once, tensors memory-mapped, no code of theirs ever run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fvgen.errors import UserError, first_line
from fvgen.system.doors import other_kind
from fvgen.system.weights import DAMAGE, read_weights_file

PREFIXES = ("_forward_module.", "_orig_mod.", "module.")  # of Lightning with DeepSpeed, torch.compile, DDP
CURE = "copy or download it again"


class CheckpointFile:
    """A `.safetensors`, or what torch.save wrote: {"state_dict": ...}, {"module": ...},
    {"model": ...}, or a state dict.

    `tensors` maps the file anew at every call, so that the memory of a component goes with the component.

    Args:
        path: the file.
        normalise: applied to every name.

    Raises:
        UserError: a file that is cut short, holds code, or is no checkpoint.
    """

    def __init__(self, path: Path, normalise: Callable[[str], str] = str) -> None:
        self.path, self.normalise = path, normalise
        self.shapes = {name: tuple(value.shape) for name, value in self.tensors().items()}

    def tensors(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """The tensors whose (normalised) names are wanted, as views of the file's memory map."""
        try:
            content = read_weights_file(self.path)
        except DAMAGE as error:
            if other := other_kind(self.path):
                raise UserError(f"the checkpoint {self.path} {other}") from error
            raise UserError(_reason(self.path, error)) from error
        state = _state_dict(content, self.path)
        return {name: x for key, x in state.items() if wanted(name := self.normalise(key))}


def _state_dict(content: Any, path: Path) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        state = content["state_dict"]
    else:
        inner = content if isinstance(content, Mapping) else {}
        state = next((inner[key] for key in ("module", "model") if isinstance(inner.get(key), Mapping)), content)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state_dict of tensors; give the model's checkpoint file")
    return {_bare(name): value for name, value in state.items()}


def _bare(name: str) -> str:
    """Without what wrappers put before it, however often."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _reason(path: Path, error: Exception) -> str:
    """The sentence for a file that cannot be read."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot read the checkpoint {path} ({error.strerror}); {CURE}"
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"the checkpoint {path} holds more than weights ({found[1]}), and code in it is never run; "
            "save its state_dict alone, or as .safetensors"
        )
    return f"the checkpoint {path} is damaged or cut short ({first_line(error).rstrip('.')}); {CURE}"
