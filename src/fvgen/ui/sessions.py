"""A folder for every visitor, under a name that nobody can guess, and its end."""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvgen.errors import UserError
from fvgen.system.doors import problem, read_bytes
from fvgen.system.files import atomic_path, new_folder, remove, write_bytes
from fvgen.ui.limits import Limits, judge_uploads
from fvgen.ui.running import Running

SERVED = re.compile(  # all that the page hands out of a visitor's folder; see `fvgen.ui.work` for who writes it
    r"look/(?:look\.html|render\.mp4)"
    r"|[0-9a-f]{12}/(?:compare\.html|walk\.zip|(?:walk|teacher|student)/(?:video\.mp4|render\.mp4|scene\.html|run\.html))"
)


@dataclass
class Session:
    """folder: the visitor's own. token: its name in addresses. used: when last heard of, by the clock of `Sessions`.
    busy: a job is at work, ``running`` once its process is there. uploads: files in the page's upload folder that came
    from here."""

    token: str
    folder: Path
    used: float
    busy: bool = False
    running: Running | None = None
    closed: bool = False
    uploads: set[Path] = field(default_factory=set)


class Sessions:
    """Of all visitors. Their own word for themselves (``key``, Gradio's session hash) is never a part of a path."""

    def __init__(self, root: Path, keep_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.root, self.keep, self.clock = root, keep_seconds, clock
        self.uploads = new_folder(root / "uploads")
        self._by_key: dict[str, Session] = {}
        self._lock = threading.Lock()

    def of(self, key: str | None) -> Session:
        """The visitor's session, a new one for somebody new. Raises UserError for a visitor without a name."""
        if not key:
            raise UserError("this request has no session; open the page in a browser")
        with self._lock:
            if key not in self._by_key:
                token = secrets.token_urlsafe(18)
                folder = new_folder(self.root / "sessions" / token)
                self._by_key[key] = Session(token, folder, self.clock())
            session = self._by_key[key]
            session.used = self.clock()
            return session

    def served(self, token: str, name: str) -> Path | None:
        """The file that an address means, if it is one of those that are handed out and there."""
        with self._lock:
            session = next((s for s in self._by_key.values() if secrets.compare_digest(s.token, token)), None)
        if session is None or not SERVED.fullmatch(name):
            return None
        file = session.folder / name
        return file if problem(file) is None else None

    @contextmanager
    def job(self, session: Session, call: Callable[..., None], *arguments: Any) -> Iterator[Running]:
        """A `Running` of the visitor's, ended when the block is left. Raises UserError where one is at work already."""
        with self._lock:
            if session.busy:
                raise UserError("your last job is still at work; cancel it, or wait for it")
            session.busy = not session.closed
        if session.closed:
            remove(session.folder)  # photographs that came after `close`
            raise UserError("this tab was closed, or left alone for long; open the page again")
        running = None
        try:
            running = Running(call, *arguments)
            with self._lock:
                session.running, closed = running, session.closed
            if closed:
                running.stop()
            yield running
        finally:
            if running is not None:
                running.stop()
            self._release(session, running)
            if session.closed:
                remove(session.folder)  # what it wrote after `close`

    def _release(self, session: Session, running: Running | None) -> None:
        with self._lock:
            if session.running is running:  # else `stop` was before us, and another job may be at work
                session.running, session.busy, session.used = None, False, self.clock()

    def stop(self, key: str | None) -> bool:
        """End the visitor's job, if one is at work; when this returns no process of it lives, and another may begin."""
        with self._lock:
            session = self._by_key.get(key or "")
            running = session.running if session else None
        if running is None:
            return False
        running.stop()
        self._release(session, running)
        return True

    def close(self, key: str | None) -> None:
        """A tab was closed, or nobody came back: its job ends, its folder and uploads go."""
        with self._lock:
            session = self._by_key.pop(key or "", None)
            others = {file for s in self._by_key.values() for file in s.uploads}
            if session is None:
                return
            session.closed, running = True, session.running
        if running is not None:
            running.stop()
        for file in session.uploads - others:  # of the same photograph from two visitors Gradio keeps one file
            remove(file)
        remove(session.folder)

    def sweep(self) -> None:
        """Close sessions without a job that were not heard of for long, and remove uploads as old that nobody used."""
        now = self.clock()
        with self._lock:
            old = [key for key, s in self._by_key.items() if not s.busy and now - s.used > self.keep]
            known = {file for s in self._by_key.values() for file in s.uploads}
        for key in old:
            self.close(key)
        for file in self.uploads.rglob("*"):
            try:
                age = time.time() - file.stat().st_mtime
            except OSError:  # went away meanwhile
                continue
            if age > self.keep and file not in known and not (file.is_dir() and any(file.iterdir())):
                remove(file)

    def close_all(self) -> None:
        for key in list(self._by_key):
            self.close(key)


def take_photographs(session: Session, files: Sequence[Path], uploads: Path, limits: Limits) -> list[Path]:
    """Copies of judged uploads in the visitor's folder, below a name that follows from them; the same again are not
    copied. Paths begin at the visitor's folder. Raises UserError as `judge_uploads` does."""
    session.uploads |= {file for file in files if uploads.resolve() in file.resolve().parents}
    names = judge_uploads(files, uploads, limits)
    contents = {name: read_bytes(file, limits.file_bytes) for name, file in zip(names, files, strict=True)}
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0".encode() + hashlib.sha256(content).digest())
    place = Path("photographs", digest.hexdigest()[:12])
    if not (session.folder / place).exists():
        remove(session.folder / "photographs")
        with atomic_path(session.folder / place) as temporary:
            new_folder(temporary)
            for name, content in contents.items():
                write_bytes(temporary / name, content)
    return [place / name for name in names]
