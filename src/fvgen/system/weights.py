"""Weights files of any origin, read without running what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from fvgen.system.doors import load_pickle, load_tensors

# What a file that is cut short, holds code or is something else raises, after torch or safetensors tried to read it.
DAMAGE = (OSError, EOFError, SafetensorError, UnpicklingError, RuntimeError, ValueError, LookupError)


def read_weights_file(path: Path, allowed: Sequence[type] = ()) -> Any:
    """{name: tensor} of a `.safetensors`, or whatever torch.save wrote in any other file.

    Tensors are on the CPU and views of the file's memory map (but for torch's format before 1.6, which has none), so
    that only what is used is ever read.

    Args:
        path: the file.
        allowed: classes besides torch's own that a pickle may hold. They are built, so name only harmless ones.

    Raises:
        one of `DAMAGE`: what the user should do about it is for the caller to say.
    """
    if path.suffix == ".safetensors":
        return load_tensors(path)
    return load_pickle(path, allowed)
