"""Folders of files, on this machine or elsewhere: local paths, and s3://, gs://, hf://, ... through fsspec.

Nothing is fetched unless FVGEN_DOWNLOAD=1 allows it, and it is said on stderr. What was fetched is kept in fvgen's
cache, under its checksum.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fvgen.clips.builtin import cache_folder
from fvgen.errors import UserError, first_line
from fvgen.system.doors import read_text, stream
from fvgen.system.files import atomic_path

T = TypeVar("T")


class Place(Protocol):
    """``str()`` of it is its address."""

    def names(self, pattern: str) -> list[str]:
        """Of the files that match a glob pattern, sorted."""

    def text(self, name: str) -> str:
        """The content of a small text file."""

    def local(self, name: str, sha256: str) -> Path:
        """A file on this machine with the content of ``name``; it need not be right, nor, locally, exist."""


def open_place(path: str | Path) -> Place:
    """Raises UserError for what is no folder, and for an address that must not or cannot be reached."""
    return RemotePlace(str(path)) if "://" in str(path) else LocalPlace(Path(path))


class LocalPlace:
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            state = "is a file, not a folder" if folder.exists() else "does not exist"
            raise UserError(f"data folder {folder} {state}; give a folder that `fvgen prepare` wrote")
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def names(self, pattern: str) -> list[str]:
        return sorted(path.name for path in self.folder.glob(pattern))

    def text(self, name: str) -> str:
        return read_text(self.folder / name)

    def local(self, name: str, sha256: str) -> Path:
        return self.folder / name


class RemotePlace:
    """A folder behind an address that fsspec knows; files come to the cache one by one, when they are needed."""

    def __init__(self, address: str) -> None:
        from fvgen.pipelines.hub import announce

        self.address = address.rstrip("/")
        announce(self.address)
        self._fs, self._root = self._ask(self._connect)

    def __str__(self) -> str:
        return self.address

    def names(self, pattern: str) -> list[str]:
        return sorted(
            str(path).rsplit("/", 1)[-1] for path in self._ask(lambda: self._fs.glob(f"{self._root}/{pattern}"))
        )

    def text(self, name: str) -> str:
        return self._ask(lambda: self._fs.cat_file(f"{self._root}/{name}").decode())

    def local(self, name: str, sha256: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise UserError(f"shard {self}/{name} has no SHA-256 of 64 hex digits in its index; upload the index again")
        path = cache_folder() / "shards" / f"{sha256}.safetensors"
        if not path.exists():
            with atomic_path(path) as temporary:
                self._ask(lambda: self._fs.get_file(f"{self._root}/{name}", str(temporary)))
                if sha256_of(temporary) != sha256:
                    raise UserError(
                        f"shard {self}/{name} is truncated or altered (its SHA-256 is not the recorded one); upload it "
                        "again"
                    )
        return path

    def _connect(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        return url_to_fs(self.address)

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except Exception as error:  # every kind of storage has errors of its own
            raise UserError(
                f"{self.address} cannot be read ({first_line(error)}); check the address, your credentials, and that "
                "fsspec's package for it is installed (s3fs, gcsfs, ...)"
            ) from error


def sha256_of(path: Path) -> str:
    """Hex digits, read in pieces."""
    digest = hashlib.sha256()
    with stream(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
