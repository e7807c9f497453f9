"""The numbers of scored runs: means over seeds, differences paired by them, quality against evaluations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fvgen.metrics.intervals import half_width, paired
from fvgen.reports.page import LABELS, TABLE, Cell, headers
from fvgen.reports.runs import Group

UNTRAINED = ("render", "teacher", "teacher_few")  # rows that no method has changed
STUDENTS = ("gan_init", "student")
QUALITY = ("lpips", "kid_squeeze", "fid", "psnr")  # that are drawn over NFE
COUNTS = ("steps", "nfe", "seconds_per_clip")


@dataclass(frozen=True)
class Row:
    """What was scored, once a seed. ``group``: whose, by its place; None for what no method has changed."""

    label: str
    group: int | None
    scores: Sequence[Mapping]


@dataclass(frozen=True)
class Point:
    """A mean over seeds at ``nfe`` evaluations, and half of its 95 % interval (0 where none is known)."""

    label: str
    group: int | None
    nfe: float
    mean: float
    half: float


def scored_rows(groups: Sequence[Group]) -> list[Row]:
    """Everything that the runs' reports hold."""
    reports = {run.seed: run.report for group in reversed(groups) for run in group.runs if run.report}  # one of a seed
    rows = [Row(LABELS[key], None, _scores(reports.values(), key)) for key in UNTRAINED]
    for place, group in enumerate(groups):
        ours = [run.report for run in group.runs if run.report]
        label = "" if len(groups) == 1 else f": {group.label}"
        rows += [Row(LABELS[key] + label, place, _scores(ours, key)) for key in STUDENTS]
    return [row for row in rows if row.scores]


def numbers(rows: Sequence[Row]) -> tuple[list[str], list[tuple[Row, list[Cell]]]]:
    """Header and cells: means over seeds with their 95 % interval, or of a single run over its clips."""
    keys = [key for key in TABLE if any(score.get(key) is not None for row in rows for score in row.scores)]
    return headers(keys, [score for row in rows for score in row.scores]), [
        (row, [_cell(row.scores, key) for key in keys]) for row in rows
    ]


def differences(groups: Sequence[Group]) -> list[tuple[str, str, list[tuple[str, Cell]]]]:
    """(what, "seed" or "clip" by which it is paired, [(metric, difference)]): each group's student against the
    untrained teacher, and against the first group's student."""
    scored = [group for group in groups if any(run.report for run in group.runs)]
    found: list[tuple[str, list[tuple[Mapping | None, Mapping | None]]]] = []
    for group in scored:
        reports = {run.seed: run.report["rows"] for run in group.runs if run.report}
        name = LABELS["student"] + ("" if len(scored) == 1 else f" of {group.label}")
        for other in ("teacher_few", "teacher"):
            pairs = [(rows.get("student"), rows.get(other)) for rows in reports.values()]
            found.append((f"{name} minus {LABELS[other].lower()}", pairs))
        if group is not scored[0]:
            first = {run.seed: run.report["rows"] for run in scored[0].runs if run.report}
            pairs = [(rows.get("student"), first[s].get("student")) for s, rows in reports.items() if s in first]
            found.append((f"{name} minus that of {scored[0].label}", pairs))
    whole = [(label, [(a, b) for a, b in pairs if a and b]) for label, pairs in found]
    rows = [(label, "seed" if len(pairs) > 1 else "clip", _gains(pairs)) for label, pairs in whole]
    return [row for row in rows if row[2]]


def quality(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """By metric the points of all that evaluates a network."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        for key in QUALITY:
            values = [score.get(key) for score in row.scores]
            if row.scores[0].get("nfe") and None not in values:
                half = half_width(values)
                known = 0.0 if math.isnan(half) else half
                point = Point(row.label, row.group, float(row.scores[0]["nfe"]), statistics.mean(values), known)
                found.setdefault(key, []).append(point)
    return {key: found[key] for key in QUALITY if key in found}


def _scores(reports: Sequence[Mapping], key: str) -> list[Mapping]:
    return [report["rows"][key] for report in reports if key in report["rows"]]


def _cell(scores: Sequence[Mapping], key: str) -> Cell:
    values = [score.get(key) for score in scores]
    if None in values:
        return Cell("–")
    spread = values if len(values) > 1 else [v for v in scores[0].get("by_clip", {}).get(key, ()) if v is not None]
    form = ".3g" if TABLE[key][1] == "d" else TABLE[key][1]
    half = math.nan if key in COUNTS else half_width(spread)
    return Cell(format(statistics.mean(values), form), _half(half, key))


def _gains(pairs: Sequence[tuple[Mapping, Mapping]]) -> list[tuple[str, Cell]]:
    cells = []
    for key in (key for key in TABLE if key not in COUNTS):
        if len(pairs) == 1:
            clips = zip(*(row.get("by_clip", {}).get(key, ()) for row in pairs[0]), strict=False)
            values = [(a, b) for a, b in clips if None not in (a, b)]
        else:
            values = [(ours.get(key), theirs.get(key)) for ours, theirs in pairs]
        difference = paired([a for a, _ in values], [b for _, b in values])
        if difference is not None:
            cell = Cell(f"{difference['mean']:+{TABLE[key][1]}}", _half(difference["half_width"], key))
            cells.append((TABLE[key][0], cell))
    return cells


def _half(half: float, key: str) -> str:
    return "" if math.isnan(half) else f"± {half:{TABLE[key][1]}}"
