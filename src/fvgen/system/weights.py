"""Weights files of any origin, read without running what is in them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# What a file that is cut short, holds code or is something else raises, after torch or safetensors tried to read it.
DAMAGE = (OSError, EOFError, SafetensorError, UnpicklingError, RuntimeError, ValueError, LookupError)


def other_kind(path: Path) -> str | None:
    """What a file is by its first bytes, and the cure, where that is a usual mistake; None for all others.

    "git clone" without git-lfs leaves pointers, a browser or `wget` saves pages in place of files.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip().lower()
    except OSError:
        return None
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file; run `git lfs pull` or download the file itself"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file; use the download link, and log in where the site asks for it"
    return None


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
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    mapped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if file.read(2) == b"PK" and not mapped:
            raise EOFError("it is cut short")
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
