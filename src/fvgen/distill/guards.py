"""What ends a run in order: a signal, or numbers that stay broken."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fvgen.errors import Stopped, UserError

SKIPPED = "not_finite"
"""Key of a row of metrics.jsonl whose iteration had values that are no numbers: their names."""


class Stop:
    """Whether somebody asked for the end."""

    requested = False


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """SIGTERM (pre-emption) only sets a flag inside: the loop saves after the iteration at hand and ends."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        stop.requested = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block at once with `Stopped`: for what comes before and after the loop, where the files at
    hand are whole or absent and the same command goes on. (`stop_on_sigterm` takes over inside.)"""

    def end(number: int, frame: object) -> None:
        raise Stopped("stopped by SIGTERM; the same command goes on")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def finite_row(values: Mapping[str, float]) -> dict[str, Any]:
    """The values that are numbers, and under `SKIPPED` the names of those that are not.

    An engine has skipped the update of every network whose gradient's norm is among the latter.
    """
    bad = [key for key, value in values.items() if not math.isfinite(value)]
    good = {key: value for key, value in values.items() if key not in bad}
    return good | {SKIPPED: bad} if bad else good


class SkipGuard:
    """Stops a run after ``most`` iterations in a row that were not finite. ``total`` counts all of them."""

    def __init__(self, most: int, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        self.most, self.in_a_row, self.total = most, 0, 0
        for row in rows:
            self._count(row)

    def _count(self, row: Mapping[str, Any]) -> None:
        bad = SKIPPED in row
        self.total += bad
        self.in_a_row = self.in_a_row + 1 if bad else 0

    def judge(self, row: Mapping[str, Any], iteration: int) -> None:
        """Raises UserError when that was one too many."""
        self._count(row)
        if self.in_a_row >= self.most:
            names = ", ".join(row[SKIPPED])
            raise UserError(
                f"training diverged: {names} is not finite at iteration {iteration}, the last of {self.in_a_row} in a "
                "row whose updates were skipped; lower the learning rates"
            )
