"""How far a stage is: a bar for who sits at the terminal, lines for everybody else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fvgen.errors import UserError
from fvgen.system.files import append_line

LINES = "log.txt"
SECONDS = 10.0


class ProgressLines:
    """A line now and then in ``folder``/log.txt; where stderr is no terminal there as well, unless FVGEN_PROGRESS=0."""

    def __init__(self, folder: Path, stage: str, done: int, total: int, every: float = SECONDS) -> None:
        self.file, self.stage, self.done, self.total, self.every = folder / LINES, stage, done, total, every
        self.start = time.monotonic()
        self.next = self.start

    def tell(self, iteration: int, losses: str, last: bool = False) -> None:
        """After an iteration: of the first one, of the ``last``, and after every few seconds between."""
        now = time.monotonic()
        if now < self.next and not last:
            return
        self.next = now + self.every
        spent = now - self.start
        left = spent * (self.total - iteration) / (iteration - self.done)
        times = f"{_clock(spent)} left {_clock(left)}"
        line = f"{time.strftime('%F %T')} stage {self.stage} {iteration}/{self.total} {losses} {times}"
        with suppress(UserError, OSError):  # metrics.jsonl will say that the disk is full
            append_line(self.file, line)
        if not sys.stderr.isatty() and os.environ.get("FVGEN_PROGRESS") != "0":
            print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def brief(row: Mapping[str, Any], skipped: int) -> str:
    """A row's losses, each by a word: those of the head, of the student before it and of distribution matching, of the
    fake score."""
    names = {"loss_head": "head", "loss_student_gan": "gan", "loss_student_dmd": "dmd", "loss_fake_score": "fake"}
    losses = " ".join(f"{short} {row[key]:.2f}" for key, short in names.items() if key in row)
    return f"{losses} skipped {skipped}" if skipped else losses


def progress_bar(visible: bool) -> Progress:
    """Both time scales: the student's updates and, where there is room, the critics'; time so far and time left."""
    wide = get_console().width >= 100
    columns: Sequence = (
        TextColumn("{task.description}"),
        BarColumn(None if wide else 4),
        MofNCompleteColumn(),
        *([TextColumn("(critics {task.fields[critics]})")] if wide else []),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=not visible)
