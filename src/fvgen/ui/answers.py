"""What happens when something is pressed: from a visitor's choices to pieces of the page. Nothing here knows Gradio."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fvgen.errors import UserError, short
from fvgen.ui import jobs, order, parts
from fvgen.ui.limits import Limits, judge_uploads
from fvgen.ui.order import Order
from fvgen.ui.running import Message
from fvgen.ui.sessions import Session, Sessions, take_photographs

BOTH = "both"
ENDS = ("done", "refused", "failed", "stopped")  # last messages of a job
LAST_LINES = 8  # of what a job says
State = tuple[str, str | None]  # how far it is, and what was made of it, if anything is new


class Asked(NamedTuple):
    """The fields of the page, in its order; numbers are 0 or None where nothing was chosen."""

    files: list[str] | None
    path: str
    amount: float | None
    steps: int | None
    which: str
    scene: bool
    height: int | None
    width: int | None
    frames: int | None
    seed: int | None


@dataclass(frozen=True)
class Answers:
    """models: folder or preset by name, "walk" alone or "student" and "teacher". ``key`` is Gradio's name for a
    visitor everywhere."""

    models: dict[str, str]
    device: str
    limits: Limits
    sessions: Sessions

    def judge(self, key: str | None, files: Sequence[str] | None) -> str:
        """At once, when photographs were dropped."""
        paths = [Path(file) for file in files or []]
        try:
            self.sessions.of(key).uploads |= set(paths)
            names = judge_uploads(paths, self.sessions.uploads, self.limits)
        except UserError as error:
            return parts.refused(str(error))
        many = "1 photograph" if len(names) == 1 else f"{len(names)} photographs"
        return parts.told(f"{many}. Look where they lead, or generate at once.")

    def look(self, key: str | None, asked: Asked) -> Iterator[State]:
        """The cloud and the path."""
        return self._run(key, asked, jobs.look, "Looking", self._looked)

    def make(self, key: str | None, asked: Asked) -> Iterator[State]:
        """The walk."""
        return self._run(key, asked, jobs.make, "Generating", self._made)

    def stop(self, key: str | None) -> str:
        """End the visitor's job; a waiting one was taken from the queue before."""
        self.sessions.stop(key)
        return parts.told("Cancelled. The same settings again go on where this was.")

    def order(self, session: Session, asked: Asked) -> Order:
        """What is asked for, with photographs in the visitor's folder. Raises UserError for what cannot be."""
        chosen = list(self.models) if asked.which == BOTH else [asked.which]
        if unknown := [name for name in chosen if name not in self.models]:
            raise UserError(f"there is no model {short(unknown[0])} here; choose one of the list")
        path = order.path_words(asked.path, asked.amount or None)
        size = order.frame_size(asked.height or None, asked.width or None, self.limits.frame_pixels)
        seed = order.seed_of(asked.seed)
        files = [Path(file) for file in asked.files or []]
        photographs = take_photographs(session, files, self.sessions.uploads, self.limits)
        models = tuple((name, self.models[name]) for name in chosen)
        numbers = (asked.frames or None, asked.steps or None, size, seed)
        return Order(tuple(map(str, photographs)), models, path, *numbers, bool(asked.scene), self.device)

    def _run(
        self,
        key: str | None,
        asked: Asked,
        call: Callable[..., None],
        verb: str,
        shown: Callable[[Session, Order], str],
    ) -> Iterator[State]:
        lines: list[str] = []
        end: Message = ("stopped",)
        try:
            session = self.sessions.of(key)
            wanted = self.order(session, asked)
            yield parts.told(f"{verb} ..."), None
            with self.sessions.job(session, call, session.folder, wanted) as running:
                follow = Follow(verb, lines)
                for message in running.messages(60 * self.limits.minutes):
                    if message is not None and message[0] in ENDS:
                        end = message
                        break
                    yield follow.said(message), None
        except UserError as error:
            end = ("refused", str(error))
        if end[0] == "done":
            yield parts.told("Done.", lines), shown(session, wanted)
        elif end[0] == "stopped":
            yield parts.told("Cancelled.", lines), None
        else:
            yield parts.refused(end[1], lines), None

    def _looked(self, session: Session, wanted: Order) -> str:
        return parts.looked(f"walks/{session.token}", str(time.time_ns()))

    def _made(self, session: Session, wanted: Order) -> str:
        names = [name for name, _ in wanted.models]
        place = session.folder / wanted.folder
        scenes = [name for name in names if (place / name / "scene.html").is_file()]
        size = (place / "walk.zip").stat().st_size
        return parts.made(f"walks/{session.token}", wanted.folder, names, scenes, size)


class Follow:
    """A job's messages as HTML: what it does, for how long, how much of it is done; its lines go to ``lines``."""

    def __init__(self, verb: str, lines: list[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.verb, self.lines, self.clock = verb, lines, clock
        self.begun, self.model, self.step = clock(), "", ("", 0, 0)

    def said(self, message: Message | None) -> str:
        kind = message[0] if message else None
        if kind == "told":
            self.lines[:] = [*self.lines, message[1]][-LAST_LINES:]
        elif kind == "step":
            self.step = message[1:]
        elif kind == "model":
            self.model, self.step = ("" if message[1] == "walk" else f", {message[1]}"), ("", 0, 0)
        what, done, total = self.step
        step = f", {done} of {total} {what}" if total else ""
        return parts.told(f"{self.verb}{self.model}{step}: {self.clock() - self.begun:.0f} s", self.lines, done, total)
