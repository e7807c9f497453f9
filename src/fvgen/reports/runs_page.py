"""`fvgen report`: one page for one run or several, seeds of one method or methods beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fvgen.diagnosis.series import Series
from fvgen.reports.comparison import Point, differences, numbers, quality, scored_rows
from fvgen.reports.curves import COLORS, TITLES, Curve, curves, round_numbers
from fvgen.reports.page import LABELS, TABLE, ReportClip, is_page, page_template, pictures
from fvgen.reports.runs import Group, Run, grouped, read_runs
from fvgen.system.files import atomic_path, judge_output, write_text

MOST_COLUMNS = 10  # of moving pictures
BESIDE = 0.03  # of a chart's width: between points that have one place


@dataclass(frozen=True)
class Dot:
    """A point of a drawing in the unit square, y pointing down; ``low``, ``high``: ends of its interval."""

    label: str
    color: int
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Chart:
    """Quality over evaluations: dots, and (position, text) ticks."""

    title: str
    dots: list[Dot]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the page of ``runs`` to ``out``; returns it. Each is a stage's folder, or that of a demo or of
    `recipes/distill.py`.

    Runs that differ in their seed alone are one method: means, intervals and bands are over its seeds. The page holds
    everything itself and loads nothing. Raises UserError for a folder without a run, runs that cannot stand beside one
    another (one given twice, one seed of one method twice, scored on other scenes), and a place to write that is not
    ours.
    """
    out = judge_output(out, is_page, runs)
    given = read_runs(runs)
    groups = grouped(given)
    with atomic_path(out) as temporary:
        write_text(temporary, page_template("runs.html.jinja").render(**content(given, groups)))
    return out


def content(given: Sequence[Run], groups: Sequence[Group]) -> dict[str, Any]:
    """All that the page shows."""
    rows = scored_rows(groups)
    header, table = numbers(rows)
    stages = max(len(run.stages) for run in given)
    scored = [run for run in given if run.report]
    return {
        "title": f"{len(given)} run{'s' * (len(given) > 1)} of {len(groups)} method{'s' * (len(groups) > 1)}",
        "groups": groups,
        "seconds": {run.place: sum(_seconds(stage) for stage in run.stages) for run in given},
        "diagnoses": [each for run in given for each in run.diagnoses],
        "notes": [f"{run.place}: {note}" for run in given for note in run.notes],
        "report": scored[0].report if scored else None,
        "header": header,
        "table": table,
        "several": any(len(row.scores) > 1 for row in rows),
        "differences": [(label, f"· by {by}", cells) for label, by, cells in differences(groups)],
        "charts": [chart(key, points) for key, points in quality(rows).items()],
        "clips": [*held_out(groups), *samples(groups)],
        "unshown": max(0, len(given) - MOST_COLUMNS),
        "curves": [(_stage_name(given, place), stage_curves(groups, place)) for place in range(stages)],
        "colors": COLORS,
    }


def stage_curves(groups: Sequence[Group], place: int) -> list[Curve]:
    """Of the stages at ``place`` in their runs, a line a group."""
    rows = {group.label: [run.stages[place].rows for run in group.runs if place < len(run.stages)] for group in groups}
    return curves(rows, TITLES)


def held_out(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The clips that demos were scored on and that all of them show: what is given, the teacher, each run's student,
    and the truth. Each with its ``captions``."""
    runs = [(group, run) for group in groups for run in group.runs if run.clips][:MOST_COLUMNS]
    if not runs:
        return []
    by_name = [{clip["name"]: clip for clip in run.clips} for _, run in runs]
    found = []
    for name, first in by_name[0].items():
        each = [clips[name] for clips in by_name if name in clips]
        if len(each) < len(runs) or len({(c["frames"], c["columns"], c["height"], c["width"]) for c in each}) > 1:
            continue
        sheets = {key: first["sheets"][key] for key in ("render", "teacher") if key in first["sheets"]}
        captions = {key: (LABELS[key], "") for key in (*sheets, "truth")}
        for place, ((group, run), clip) in enumerate(zip(runs, each, strict=True)):
            if "student" in clip["sheets"]:
                sheets[f"run{place}"] = clip["sheets"]["student"]
                captions[f"run{place}"] = _caption(group, run, groups)
        if "truth" in first["sheets"]:
            sheets["truth"] = first["sheets"]["truth"]
        kind = {"what": "held-out clip", "captions": captions}
        found.append({**first, "known": first.get("known", []), "sheets": sheets, **kind})
    return found


def samples(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The last sample clips of each run's last stage, beside the clip that they are to look like: one for each such
    clip and each of the sampled seeds."""
    having = [(group, run) for group in groups for run in group.runs if run.stages[-1].last is not None]
    found: list[dict[str, Any]] = []
    for truth, members in _by_truth(having):
        shown = members[:MOST_COLUMNS]
        count = min(len(run.stages[-1].last.clips) for _, run in shown)
        for noise in range(count):
            videos = {f"run{k}": _video(run.stages[-1].last.clips[noise]) for k, (_, run) in enumerate(shown)}
            captions = {
                f"run{k}": _caption(group, run, groups, f"after iteration {run.stages[-1].last.iteration}")
                for k, (group, run) in enumerate(shown)
            }
            if truth is not None:
                videos["truth"], captions["truth"] = _video(truth), ("Truth", "through encoder and decoder")
            name = f"Training clip, noise {noise + 1} of {count}"
            clip = ReportClip(name, videos)
            found.append({**pictures([clip])[0], "what": "sample", "captions": captions})
    return found


def chart(metric: str, points: Sequence[Point]) -> Chart:
    """Quality over evaluations, of which each doubling is as far as the next."""
    low = min(point.mean - point.half for point in points)
    high = max(point.mean + point.half for point in points)
    y_ticks = round_numbers(low, high)
    bottom, top = y_ticks[0], y_ticks[-1]
    last = max(1, math.ceil(math.log2(max(point.nfe for point in points))))

    def place_y(value: float) -> float:
        return 1 - (value - bottom) / (top - bottom)

    def place_x(point: Point) -> float:  # those of as many evaluations beside each other
        same = [each for each in points if each.nfe == point.nfe]
        aside = (same.index(point) - (len(same) - 1) / 2) * min(BESIDE, 0.8 / last / len(same))
        return math.log2(max(point.nfe, 1)) / last + aside

    dots = [
        Dot(
            f"{point.label}: {point.mean:.4g} in {point.nfe:g} evaluations",
            COLORS - 1 if point.group is None else point.group % COLORS,
            place_x(point),
            place_y(point.mean),
            place_y(point.mean - point.half),
            place_y(point.mean + point.half),
        )
        for point in points
    ]
    x_ticks = [(power / last, f"{2**power}") for power in range(last + 1)]
    return Chart(TABLE[metric][0], dots, x_ticks, [(place_y(value), f"{value:g}") for value in y_ticks])


def _by_truth(having: Sequence[tuple[Group, Run]]) -> list[tuple[np.ndarray | None, list[tuple[Group, Run]]]]:
    """Runs whose samples are of one clip and size, together; those that do not say what theirs is of, each alone."""
    found: list[tuple[np.ndarray | None, list[tuple[Group, Run]]]] = []
    for group, run in having:
        stage = run.stages[-1]
        same = (t is not None and stage.truth is not None and np.array_equal(t, stage.truth) for t, _ in found)
        place = next((k for k, is_so in enumerate(same) if is_so), None)
        if place is None:
            fits = stage.truth is not None and stage.truth.shape == stage.last.clips.shape[1:]
            found.append((stage.truth if fits else None, [(group, run)]))
        elif found[place][1][0][1].stages[-1].last.clips.shape[1:] == stage.last.clips.shape[1:]:
            found[place][1].append((group, run))
    return found


def _caption(group: Group, run: Run, groups: Sequence[Group], below: str = "") -> tuple[str, str]:
    name = f"Seed {run.seed}" if len(groups) == 1 else f"{group.label}, seed {run.seed}"
    return name, below


def _video(clip: np.ndarray) -> torch.Tensor:
    """[F, H, W, 3] to [F, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(clip.transpose(0, 3, 1, 2)))


def _seconds(stage: Series) -> float:
    return float(stage.values("seconds").sum())


def _stage_name(given: Sequence[Run], place: int) -> str:
    names = dict.fromkeys(str(r.stages[place].settings.get("method", "?")) for r in given if place < len(r.stages))
    return f"Stage {place + 1}: {', '.join(names)}"
