"""Checkpoints of other projects: names and shapes at once, tensors memory-mapped, no code of theirs ever run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fvgen.errors import UserError, first_line
from fvgen.system.weights import DAMAGE, read_weights_file

DEEPSPEED_PREFIX = 16  # characters of "_forward_module.", which DeepSpeed puts before every name
CURE = "copy or download it again"


class CheckpointFile:
    """A `.safetensors`, or what torch.save wrote: {"state_dict": ...}, DeepSpeed's {"module": ...} or a state dict.

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
            raise UserError(_reason(self.path, error)) from error
        state = _state_dict(content, self.path)
        return {name: x for key, x in state.items() if wanted(name := self.normalise(key))}


def _state_dict(content: Any, path: Path) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        state = content["state_dict"]
    elif isinstance(content, Mapping) and isinstance(content.get("module"), Mapping):
        state = {key[DEEPSPEED_PREFIX:]: value for key, value in content["module"].items()}
    else:
        state = content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state_dict of tensors; give the model's checkpoint file")
    return state


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
