"""`fvgen diagnose`: every pattern asked of a run, and the answers in the order of what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fvgen.diagnosis.patterns import LEVELS, PATTERNS, Pattern
from fvgen.diagnosis.series import Series, find_runs, read_series


@dataclass(frozen=True)
class Finding:
    """A pattern that a run shows. ``evidence``: a clause with the number; ``value`` is that number, ``limit`` what it
    is beyond; ``level``: "lost" (no result worth having), "harm" (a worse one) or "watch" (a cost, or a risk)."""

    pattern: str
    level: str
    evidence: str
    value: float
    limit: float
    cause: str
    cure: str


@dataclass(frozen=True)
class Diagnosis:
    """Of one stage. ``findings``: the most serious first. ``untold``: patterns that could not be looked for, and why.
    ``looked``: how many could. ``notes``: what the folder lacks."""

    run: str
    method: str
    iterations: int
    planned: int
    finished: bool
    findings: Sequence[Finding]
    looked: int
    untold: Sequence[tuple[str, str]]
    notes: Sequence[str]

    @property
    def healthy(self) -> bool:
        """Whether something was looked for, and nothing found."""
        return not self.findings and self.looked > 0

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON: no number in it is NaN or infinite."""
        return asdict(self) | {"healthy": self.healthy, "untold": dict(self.untold)}


def diagnose(run: str | Path) -> list[Diagnosis]:
    """Every stage in a folder: the one that it is, or those of a demo or of `recipes/distill.py`.

    Raises UserError for a folder that holds no run. A folder that is damaged, or of another version, is read as far as
    it goes; `Diagnosis.notes` says how far that is.
    """
    return [diagnosis_of(read_series(folder)) for folder in find_runs(run)]


def diagnosis_of(series: Series) -> Diagnosis:
    """The answers of all patterns, in the order of `LEVELS` and then of the table."""
    findings: list[Finding] = []
    untold: list[tuple[str, str]] = []
    looked = 0
    for pattern in PATTERNS:
        if pattern.of and not series.has(pattern.of):
            continue  # there is no such thing in this run, or no row yet, which a note says
        if not series.rows or (lacking := _lacking(pattern, series)):
            untold.append((pattern.name, f"without {lacking}" if series.rows else "without rows"))
            continue
        looked += 1
        if (evidence := pattern.look(series)) is not None:
            level = evidence.level or pattern.level
            facts = (evidence.says, evidence.value, evidence.limit)
            findings.append(Finding(pattern.name, level, *facts, pattern.cause, pattern.cure))
    return Diagnosis(
        run=series.name,
        method=str(series.settings.get("method", "?")),
        iterations=series.iterations,
        planned=series.planned,
        finished=series.finished,
        findings=sorted(findings, key=lambda finding: LEVELS.index(finding.level)),
        looked=looked,
        untold=untold,
        notes=series.notes,
    )


def _lacking(pattern: Pattern, series: Series) -> str | None:
    """The first number that a pattern needs and the run has not logged."""
    there = {"samples": series.last is not None}
    return next((key for key in pattern.needs if not there.get(key, series.has(key))), None)


def text_of(diagnosis: Diagnosis) -> str:
    """As the terminal shows it."""
    state = "finished" if diagnosis.finished else "not finished"
    lines = [f"{diagnosis.run}: {diagnosis.method}, {diagnosis.iterations} of {diagnosis.planned} iterations, {state}"]
    for finding in diagnosis.findings:
        lines += [
            f"  {finding.level.upper()}: {finding.pattern}. {finding.evidence}",
            f"    likely: {finding.cause}",
            f"    try:    {finding.cure}",
        ]
    if diagnosis.healthy:
        lines.append(f"  healthy: {diagnosis.looked} patterns looked for, none found")
    why: dict[str, list[str]] = {}
    for name, reason in diagnosis.untold:
        why.setdefault(reason, []).append(name)
    lines += [f"  cannot be told {reason}: {', '.join(names)}" for reason, names in why.items()]
    lines += [f"  note: {note}" for note in diagnosis.notes]
    return "\n".join(lines)
