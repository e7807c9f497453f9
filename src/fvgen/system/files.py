"""Files that are either whole or absent: everything is written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fvgen.errors import CannotWrite, UserError

TEMPORARY = ".partial"
ASIDE = TEMPORARY + ".old"  # no plain ".old": a user's own backup may be called that
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PLACE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path (for a file or a folder); on success it becomes ``path``, on failure it is removed.

    A folder already at ``path`` is moved aside before the rename and deleted after it, so that a kill at any
    point leaves either the old or the new one (or, for an instant, the old one under another name: see `recover`).
    Raises UserError when the disk is full or the place is not writable.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        yield temporary
        _sync(temporary)
        if temporary.is_dir() and path.exists():
            aside = path.with_name(path.name + ASIDE)
            os.replace(path, aside)
            os.replace(temporary, path)
            remove(aside)
        else:
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to tell
            recover(path)
        if reason := _disk_reason(error):
            raise CannotWrite(f"cannot write {path}: {reason}") from error
        raise


def recover(path: Path) -> None:
    """Put back a folder that a kill caught between the two renames of `atomic_path`; remove what else it left."""
    aside = path.with_name(path.name + ASIDE)
    if aside.exists() and not path.exists():
        os.replace(aside, path)
    remove(aside)
    remove(path.with_name(path.name + TEMPORARY))


def write_json(path: str | Path, value: object, sort_keys: bool = False) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


@contextmanager
def no_leftovers(*folders: Path) -> Iterator[None]:
    """Remove again those of ``folders`` that a failing block has made; folders that were there before stay."""
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException:  # Ctrl-C too
        for folder in new:
            remove(folder)
        raise


def append_line(path: str | Path, line: str) -> None:
    """Add ``line`` to a text file, whole or not at all. Raises UserError when the disk is full."""
    try:
        with Path(path).open("ab", buffering=0) as file:
            end, rest = file.tell(), (line + "\n").encode()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        if reason := _disk_reason(error):
            raise CannotWrite(f"cannot write {path}: {reason}") from error
        raise


def writable_folder(path: str | Path) -> Path:
    """Create the folder ``path`` if needed; raises UserError when that is impossible or it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test{TEMPORARY}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _closed(path, error) from error
    return path


def _closed(folder: Path, error: OSError) -> CannotWrite:
    return CannotWrite(f"output folder {folder} cannot be written ({_in_words(error.errno)}); choose another one")


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the lock of the file ``path``; the system gives it back when the process dies. Raises UserError where anyone
    else has it."""
    guard = FileLock(path)
    try:
        guard.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is at work in {Path(path).parent}; wait for it, stop it, or choose another folder"
        ) from None
    except OSError as error:
        raise _closed(Path(path).parent, error) from error
    try:
        yield
    finally:
        guard.release()


def _disk_reason(error: BaseException) -> str | None:
    """The cure for a failing disk, or None for any other error.

    safetensors (Rust) and shutil.copytree keep the error number in their text only; torch.save loses it: its zip
    writer says "file write failed" or "unexpected pos", whatever the reason was.
    """
    if isinstance(error, UserError):
        return None
    found = re.search(r"(?:os error |\[Errno )(\d+)", str(error))
    number = int(found[1]) if found else None
    if number in FULL or re.search(r"PytorchStreamWriter failed|unexpected pos", str(error)):
        return "the disk is full; free some space and run the same command again"
    return f"{_in_words(number)}; choose another output folder" if number in PLACE else None


def _in_words(number: int) -> str:
    return "a file stands where a folder should be" if number in (errno.EEXIST, errno.ENOTDIR) else os.strerror(number)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def _sync(path: Path) -> None:
    """Flush to the disk before the rename, so that a power cut cannot leave an empty file under the final name."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
