"""What several test files ask of folders and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fvgen.errors import UserError
from fvgen.system.places import sha256_of


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of all files below a folder, by name."""
    return {path.name: sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(call: Callable[[], object]) -> str:
    """The one sentence with which ``call`` is refused."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip(path: Path, place: int) -> None:
    """Another bit in a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
