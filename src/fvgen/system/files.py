"""Files that are either whole or absent: everything is written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from filelock import FileLock, Timeout

from fvgen.errors import CannotWrite, UserError, first_line, short

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".partial"
ASIDE = TEMPORARY + ".old"  # no plain ".old": a user's own backup may be called that
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PLACE = (
    *(errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.EIO, errno.ENXIO, errno.EBUSY, errno.ELOOP, errno.EMFILE, errno.ENFILE),
)
HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
LONGEST = 200  # bytes of a name that get a suffix as they are: most file systems end at 255
ABANDONED = 86_400.0  # seconds after which what another machine left half-written is taken for dead
COUNT = itertools.count()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path (for a file or a folder); on success it becomes ``path``, on failure it is removed.

    A folder already at ``path`` is moved aside before the rename and deleted after it, so that a kill at any
    point leaves either the old or the new one (or, for an instant, the old one under another name: see `recover`).
    The temporary name is nobody else's: of two that write the same path at once, the last one wins, whole.
    Raises UserError when the disk is full or the place is not writable, and never replaces a pipe or a device.
    """
    path = Path(path)
    temporary = _beside(path, f"{TEMPORARY}-{HOST}-{os.getpid()}-{next(COUNT)}")
    try:
        if special(path):
            raise CannotWrite(f"cannot write {path}: it is a pipe, a socket or a device; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        yield temporary
        _sync(temporary)
        if temporary.is_dir() and path.exists():
            aside = _beside(path, ASIDE)
            os.replace(path, aside)
            os.replace(temporary, path)
            remove(aside)
        else:
            os.replace(temporary, path)
    except BaseException as error:
        reason = disk_reason(error) or _vanished(error, path, temporary)
        with suppress(OSError):  # the first error is the one to tell
            remove(temporary)
            recover(path)
        if reason:
            raise CannotWrite(f"cannot write {path}: {reason}") from error
        raise


def recover(path: Path) -> None:
    """Put back a folder that a kill caught between the two renames of `atomic_path`; remove what else dead processes
    left of it."""
    aside = _beside(path, ASIDE)
    if aside.exists() and not path.exists():
        os.replace(aside, path)
    remove(aside)
    beside = _beside(path, TEMPORARY)
    for leftover in beside.parent.glob(glob.escape(beside.name) + "*"):
        if not _at_work(leftover, beside.name):
            remove(leftover)


def _beside(path: Path, suffix: str) -> Path:
    """``path`` with a suffix; of a name that is too long for that, its beginning and a digest."""
    name = os.fsencode(path.name)
    if len(name) > LONGEST:
        name = name[: LONGEST - 20] + hashlib.sha256(name).hexdigest()[:12].encode()
    return path.parent / (os.fsdecode(name) + suffix)


def _at_work(leftover: Path, name: str) -> bool:
    """Whether a temporary path may be somebody's who is still writing it."""
    found = re.fullmatch(r"-([0-9a-f]{6})-(\d{1,10})-\d+(-0)?", leftover.name.removeprefix(name))
    if found is None:
        return False
    if found[1] != HOST:
        with suppress(OSError):
            return time.time() - leftover.stat().st_mtime < ABANDONED
        return False
    if int(found[2]) == os.getpid():
        return True
    try:
        os.kill(int(found[2]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


# --- What may be written ---


def special(path: Path) -> bool:
    """Whether a pipe, a socket or a device is at ``path``."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def judge_output(
    out: str | Path,
    ours: Callable[[Path], bool] | None = None,
    inputs: Iterable[str | Path] = (),
    option: str = "--out",
) -> Path:
    """The one place that decides where a command may write: a new path, or what fvgen wrote there before.

    Args:
        out: as the user gave it, for a file or a folder.
        ours: whether what is at ``out`` may be replaced or gone on with, told by its content; None: its own judge
            follows.
        inputs: files and folders that are read: ``out`` is none of them, holds none of them and lies in none of them.
        option: how the user calls it.

    Raises:
        UserError: one sentence; nothing is touched.
    """
    text, path = os.fspath(out), Path(out)
    try:
        place = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{option} {short(text)} is no path ({first_line(error)}); choose another name") from error
    here = Path.cwd()
    if not text.strip() or place == here or place in here.parents:
        raise UserError(f"{option} {short(text)} is the folder that you are in, or one above it; choose a new name")
    if special(path):
        raise UserError(f"{option} {path} is a pipe, a socket or a device; choose a new name")
    for entry in map(Path, inputs):
        read = entry.resolve()
        if place == read or read in place.parents or place in read.parents:
            raise UserError(f"{option} {path} and {entry}, which is read, lie in one another; choose another place")
    if ours is not None and os.path.lexists(path) and not ours(path):
        raise UserError(f"{option} {path} exists and fvgen did not write it; choose another name or delete it")
    return path


@contextmanager
def busy(out: str | Path) -> Iterator[None]:
    """One command at a time makes ``out``. Raises UserError where another one (of this user, on this machine) is at it;
    the lock goes with the process, and nothing is left beside ``out``."""
    user = getattr(os, "getuid", int)()
    folder = Path(tempfile.gettempdir()) / f"fvgen-{user}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    try:
        mine = stat.S_ISDIR(folder.lstat().st_mode) and folder.lstat().st_uid == user
    except OSError:
        mine = False
    if not mine:  # no place for locks: temporary names are unique in any case
        yield
        return
    name = hashlib.sha256(os.fsencode(Path(out).resolve())).hexdigest()[:24]
    with locked(folder / f"{name}.lock", f"another command writes {out}; wait for it, or choose another --out"):
        yield


# --- Small files ---


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
        reason = disk_reason(error) or f"{first_line(error)}; put its folder back, or choose another output folder"
        raise CannotWrite(f"cannot write {path}: {reason}") from error


def writable_folder(path: str | Path) -> Path:
    """Create the folder ``path`` if needed; raises UserError when that is impossible or it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test{TEMPORARY}-{HOST}-{os.getpid()}-{next(COUNT)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _closed(path, error) from error
    return path


def _closed(folder: Path, error: OSError) -> CannotWrite:
    return CannotWrite(f"output folder {folder} cannot be written ({_in_words(error.errno)}); choose another one")


@contextmanager
def locked(path: str | Path, sentence: str | None = None) -> Iterator[None]:
    """Hold the lock of the file ``path``; the system gives it back when the process dies. Raises UserError where anyone
    else has it, in this ``sentence``."""
    guard = FileLock(path)
    try:
        guard.acquire(timeout=0)
    except Timeout:
        raise UserError(
            sentence or f"another run is at work in {Path(path).parent}; wait for it, stop it, or choose another folder"
        ) from None
    except OSError as error:
        raise _closed(Path(path).parent, error) from error
    try:
        yield
    finally:
        guard.release()


def disk_reason(error: BaseException) -> str | None:
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


def _vanished(error: BaseException, path: Path, temporary: Path) -> str | None:
    """The cure where a folder went away under our hands, or None. torch says that in words of its own."""
    below = str(temporary) + os.sep  # the temporary path itself is missing where nothing was ever written to it
    if isinstance(error, FileNotFoundError):
        lost = below in str(error)
    else:
        lost = isinstance(error, RuntimeError) and f"{temporary} does not exist" in str(error)
    if not lost and (path.parent.exists() or not isinstance(error, OSError | RuntimeError)):
        return None
    return "its folder was moved or deleted meanwhile; put it back, or choose another output folder"


def _in_words(number: int) -> str:
    return "a file stands where a folder should be" if number in (errno.EEXIST, errno.ENOTDIR) else os.strerror(number)


def new_folder(path: str | Path) -> Path:
    """A folder below a temporary one (see `atomic_path`) or one that is ours; what is there stays."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _closed(path, error) from error
    return path


def write_text(path: Path, text: str) -> None:
    """Below a temporary path; `atomic_path` makes it whole."""
    path.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """The same for bytes."""
    path.write_bytes(data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A `.safetensors` file, whole or not at all."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        # safetensors writes under a random name of its own beside the one that it is given: in a folder of ours, what a
        # kill leaves of that is known by the folder's name.
        inner = temporary.with_name(temporary.name + "-0")
        try:
            inner.mkdir()
            save_file({name: x.contiguous() for name, x in tensors.items()}, inner / "0", metadata=metadata)
            os.replace(inner / "0", temporary)
        finally:
            remove(inner)


def write_state(path: Path, state: object) -> None:
    """What torch.save makes of it, below a temporary path; `fvgen.system.doors.read_state` reads it."""
    import torch

    torch.save(state, path)


def open_log(path: Path) -> IO[bytes]:
    """A file that others append to, at once."""
    return path.open("ab", buffering=0)


def move_away(path: Path) -> None:
    """Delete a folder at once: a kill must not leave half of it under its name."""
    doomed = _beside(path, f"{TEMPORARY}-{HOST}-{os.getpid()}-{next(COUNT)}")
    try:
        os.replace(path, doomed)
    except OSError as error:
        raise CannotWrite(f"cannot delete {path}: {disk_reason(error) or first_line(error)}") from error
    remove(doomed)


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
