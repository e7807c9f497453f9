"""Files that are either whole or absent: everything is written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fvgen.errors import UserError

TEMPORARY = ".partial"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path (for a file or a folder); on success it becomes ``path``, on failure it is removed.

    A folder already at ``path`` is moved aside before the rename and deleted after it, so that a kill at any
    point leaves either the old or the new one (or, for an instant, the old one under ``.old``: see `recover`).
    Raises UserError when the disk is full or the place is not writable.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        _sync(temporary)
        if temporary.is_dir() and path.exists():
            aside = path.with_name(path.name + ".old")
            _remove(aside)
            os.replace(path, aside)
            os.replace(temporary, path)
            _remove(aside)
        else:
            os.replace(temporary, path)
    except BaseException as error:
        _remove(temporary)
        if reason := _disk_reason(error):
            raise UserError(f"cannot write {path}: {reason}") from error
        raise


def recover(path: Path) -> None:
    """Put back a folder that a kill caught between the two renames of `atomic_path`."""
    aside = path.with_name(path.name + ".old")
    if aside.exists() and not path.exists():
        os.replace(aside, path)
    _remove(aside)
    _remove(path.with_name(path.name + TEMPORARY))


def write_json(path: str | Path, value: object) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def writable_folder(path: str | Path) -> Path:
    """Create the folder ``path`` if needed; raises UserError when that is impossible or it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test{TEMPORARY}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {path} cannot be written ({error.strerror}); choose another one") from error
    return path


def _disk_reason(error: BaseException) -> str | None:
    """The cure for a failing disk, or None for any other error (safetensors wraps ENOSPC in its own class)."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
        return "the disk is full; free some space and run the same command again"
    if isinstance(error, OSError) and number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
        return f"{error.strerror}; choose another output folder"
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush to the disk before the rename, so that a power cut cannot leave an empty file under the final name."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
