"""Runs side by side: which of them are seeds of one method, and what all of them together say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvgen.diagnosis.diagnose import Diagnosis, diagnosis_of
from fvgen.diagnosis.series import Series, find_runs, read_series
from fvgen.distill.settings import Log, Memory
from fvgen.errors import UserError
from fvgen.reports.page import CLIPS, LABELS, REPORT, TABLE
from fvgen.system.doors import Unreadable, read_json, read_object, there

SAME = {"out", "init", "seed", "device", "workers", "iteration", *Log.model_fields, *Memory.resumable}
"""Settings in which two runs of one method may differ."""
SHEET = re.compile(r"data:image/webp;base64,[A-Za-z0-9+/=]+")


@dataclass(frozen=True)
class Run:
    """One of the folders that were given: its stages, and of a demo its report and its clips."""

    place: Path
    stages: Sequence[Series]
    diagnoses: Sequence[Diagnosis]
    report: Mapping[str, Any] | None
    clips: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()

    @property
    def seed(self) -> int:
        return int(self.stages[-1].setting("seed", 0))

    @property
    def method(self) -> tuple[tuple[str, str], ...]:
        """Every setting that makes it another method, with its stage's name before it."""
        return tuple(
            (f"{stage.settings.get('method', '?')}.{key}", str(value))
            for stage in self.stages
            for key, value in sorted(stage.settings.items())
            if key not in SAME
        )

    @property
    def name(self) -> str:
        return " + ".join(str(stage.settings.get("method", "?")) for stage in self.stages)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    runs: Sequence[Run]


def read_run(place: str | Path) -> Run:
    """Raises UserError for a folder that holds no run; what is damaged in it is a note."""
    folder, notes, report, clips = Path(place), [], None, []
    stages = [read_series(path) for path in find_runs(folder)]
    if there(folder / REPORT):
        try:
            report = read_object(folder / REPORT)
            if not _is_report(report):
                raise Unreadable(folder / REPORT, "it is no report of fvgen demo")
        except Unreadable as error:
            notes.append(f"{REPORT} is left out ({error.reason})")
            report = None
    if report is not None and there(folder / CLIPS):
        try:
            clips = read_json(folder / CLIPS)
            if not isinstance(clips, list) or not all(map(_is_clip, clips)):
                raise Unreadable(folder / CLIPS, "it holds no clips of fvgen demo")
        except Unreadable as error:
            notes.append(f"{CLIPS} is left out ({error.reason})")
            clips = []
    return Run(folder, stages, [diagnosis_of(stage) for stage in stages], report, clips, notes)


def read_runs(places: Sequence[str | Path]) -> list[Run]:
    """Raises UserError where two are one, or where they were scored on other scenes or by another network."""
    runs = [read_run(place) for place in places]
    if len({run.place.resolve() for run in runs}) < len(runs):
        raise UserError("one of the runs is given twice; give each once")
    reports = [run for run in runs if run.report]
    for what, facts in (("on other scenes", _scenes), ("by another LPIPS network", _net)):
        if len({facts(run.report) for run in reports}) > 1:
            other = next(run.place for run in reports if facts(run.report) != facts(reports[0].report))
            raise UserError(f"{reports[0].place} and {other} were scored {what}; make a page of each")
    return runs


def grouped(runs: Sequence[Run]) -> list[Group]:
    """By method, labelled by what differs. Raises UserError where two runs of one method have one seed."""
    methods: dict[tuple, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    words = [dict(method) for method in methods]
    known = dict.fromkeys(key for each in words for key in each)
    differing = [key for key in known if len({each.get(key) for each in words}) > 1]
    groups = []
    for method, members in methods.items():
        seeds = [run.seed for run in members]
        if len(set(seeds)) < len(seeds):
            twice = next(seed for seed in seeds if seeds.count(seed) > 1)
            same = [str(run.place) for run in members if run.seed == twice]
            raise UserError(f"{same[0]} and {same[1]} have the same settings and seed {twice}; give one of them")
        mine = [f"{key}={dict(method)[key]}" for key in differing if key in dict(method)]
        several = len(members[0].stages) > 1
        said = ", ".join(mine if several else [each.split(".", 1)[1] for each in mine if ".method=" not in each])
        label = f"{members[0].name} ({said})" if said else members[0].name
        if label in {group.label for group in groups}:  # what differs is in no settings: a file that is not there
            label = str(members[0].place)
        groups.append(Group(label, members))
    return groups


def _scenes(report: Mapping[str, Any]) -> str:
    return str((report.get("data"), report.get("scenes"), report.get("clips")))


def _net(report: Mapping[str, Any]) -> str:
    return str(sorted({str(row.get("lpips_net")) for row in report["rows"].values()}))


def _is_report(report: Mapping[str, Any]) -> bool:
    rows = report.get("rows")
    if not isinstance(rows, dict) or not set(rows) <= set(LABELS) or not rows:
        return False
    return all(
        isinstance(row, dict) and all(_is_score(row.get(key)) for key in TABLE) and _by_clip(row)
        for row in rows.values()
    )


def _by_clip(row: Mapping[str, Any]) -> bool:
    found = row.get("by_clip", {})
    return isinstance(found, dict) and all(isinstance(v, list) and all(map(_is_score, v)) for v in found.values())


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


def _is_clip(clip: Any) -> bool:
    if not isinstance(clip, dict) or not isinstance(clip.get("name"), str) or not isinstance(clip.get("sheets"), dict):
        return False
    counts = [clip.get(key) for key in ("frames", "columns", "height", "width")]
    known = clip.get("known", [])
    return (
        all(type(count) is int and 0 < count < 100_000 for count in counts)
        and isinstance(known, list)
        and all(type(place) is int for place in known)
        and all(key in LABELS and isinstance(v, str) and SHEET.fullmatch(v) for key, v in clip["sheets"].items())
    )
