"""Patterns of the student's numbers and of the log itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fvgen.diagnosis.critics import FEWEST, risen
from fvgen.diagnosis.evidence import Evidence
from fvgen.diagnosis.series import Series
from fvgen.distill.guards import SKIPPED
from fvgen.distill.settings import Log

MAX_SKIPS = Log().max_skips


def diverged(series: Series) -> Evidence | None:
    in_a_row = 0
    for row in series.rows:
        in_a_row = in_a_row + 1 if SKIPPED in row else 0
    most = min(series.setting("max_skips", MAX_SKIPS), max(series.planned, 1))
    if not in_a_row or series.finished or in_a_row < most:
        return None
    said = f"the last {in_a_row} iterations were skipped: {_named(series.rows[-1:])} is no number"
    return Evidence(f"{said} at iteration {series.iterations} of {series.planned}", in_a_row, most)


def skipped(series: Series) -> Evidence | None:
    bad = [row for row in series.rows if SKIPPED in row]
    if not bad:
        return None
    share = len(bad) / len(series.rows)
    said = f"{len(bad)} of {len(series.rows)} iterations, the first is {bad[0]['iteration']}; no numbers: {_named(bad)}"
    return Evidence(said, share, 0.1, "harm" if share > 0.1 else None)


def student_beyond(series: Series) -> Evidence | None:
    sizes = series.values("student_std")[:, 0]
    if len(sizes) < 2:  # a method that does not log it
        return None if series.has("student_std") else risen(series, "loss_student", 10)
    ratio = float(np.median(series.late("student_std")) / max(sizes[0], 1e-12))
    if 1 / 3 < ratio < 3:
        return None
    return Evidence(f"student_std went from {sizes[0]:.3g} to {ratio * sizes[0]:.3g}, {ratio:.2g} times", ratio, 3)


def contrast(series: Series) -> Evidence | None:
    sizes = series.values("student_std")[:, 0]
    early, late = sizes[: max(2, len(sizes) // 4)], sizes[len(sizes) // 2 :]
    if len(late) < FEWEST or min(early.mean(), late.mean()) <= 0 or student_beyond(series) is not None:
        return None
    ratio = float(late.mean() / early.mean())
    error = math.hypot(*(part.std(ddof=1) / math.sqrt(len(part)) / part.mean() for part in (early, late)))
    if abs(math.log(ratio)) <= max(math.log(1.5), 3 * error):
        return None
    return Evidence(f"student_std went from {early.mean():.3g} to {late.mean():.3g}, {ratio:.2g} times", ratio, 1.5)


def average_lags(series: Series) -> Evidence | None:
    decay = series.setting("ema_decay", 0.0)
    updates = series.planned - int(series.setting("head_warmup", 0))
    if updates < 1 or (left := decay**updates) <= 0.5:
        return None
    said = f"ema_decay {decay:g} and {updates} updates of the student leave {left:.0%} of the network it started from"
    return Evidence(said, left, 0.5)


def gap(series: Series) -> Evidence | None:
    found = [row["iteration"] for row in series.rows]
    holes = [(a + 1, b - 1) for a, b in pairwise([0, *found]) if b > a + 1]
    if not holes:
        return None
    missing = sum(b - a + 1 for a, b in holes)
    where = ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in holes[:5])
    return Evidence(f"{missing} of {series.iterations} iterations are missing in metrics.jsonl: {where}", missing, 0)


def repeated(series: Series) -> Evidence | None:
    again = sum(1 for a, b in pairwise(series.written) if b <= a)
    twice = sum(count - 1 for count in Counter(series.written).values())
    share = twice / max(len(set(series.written)), 1)
    if share <= 0.1:
        return None
    return Evidence(f"{twice} iterations were done again after {again} restarts, {share:.0%} of the run", share, 0.1)


def waits(series: Series) -> Evidence | None:
    seconds = series.values("data_seconds", "seconds")
    if len(seconds) < FEWEST or seconds[:, 1].sum() <= 0:
        return None
    waited, all_seconds = seconds.sum(axis=0)
    if waited <= 0.5 * all_seconds:
        return None
    return Evidence(f"{waited:.3g} of {all_seconds:.3g} s went by waiting for clips", waited / all_seconds, 0.5)


def _named(rows: Sequence[Mapping[str, Any]]) -> str:
    names = Counter(str(name) for row in rows for name in row.get(SKIPPED) or ())
    return ", ".join(name[:40] for name, _ in names.most_common(3)) or "a value"
