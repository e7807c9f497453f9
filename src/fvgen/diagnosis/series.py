"""A run's numbers as its folder has them, however much of it is there.

Everybody else refuses a run folder that is damaged or of another version. Who asks what went wrong has just such a
folder: here every file is read as far as it goes, and what could not be read is a note.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fvgen import __version__
from fvgen.distill.monitor import MONITOR_LOG, SAMPLES, TRUTH
from fvgen.distill.run_folder import CONTENTS, LOG, SUMMARY, WRITTEN_BY
from fvgen.errors import UserError, first_line
from fvgen.system.doors import Unreadable, open_image, parse_json, problem, read_object, read_text, read_yaml

CONFIG = "config.yaml"
MOST_PIXELS = 50_000_000  # of a picture of sample clips


@dataclass(frozen=True)
class Sample:
    """The student's clips after an iteration: ``clips`` [S, F, H, W, 3] in [0, 1], a seed each."""

    iteration: int
    clips: np.ndarray


@dataclass(frozen=True)
class Series:
    """What a run has left.

    settings: of config.yaml, flat; empty where there is none. rows: of metrics.jsonl and monitor.jsonl together, by
    iteration. written: iterations in the order in which monitor.jsonl got them. first, last: sample clips, and
    ``truth`` [F, H, W, 3] what they are to look like; None where there are none. notes: what is missing or damaged.
    """

    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    written: Sequence[int] = ()
    first: Sample | None = None
    last: Sample | None = None
    truth: np.ndarray | None = None
    finished: bool = False
    notes: Sequence[str] = ()

    def has(self, key: str) -> bool:
        """Whether any row has that number."""
        return any(_number(row.get(key)) for row in self.rows)

    def values(self, *keys: str, learning: bool = False) -> np.ndarray:
        """[n, len(keys)] of the rows that have all of them; ``learning``: of those in which the student learns."""
        found = [
            [row[key] for key in keys]
            for row in self.rows
            if all(_number(row.get(key)) for key in keys) and (not learning or "loss_student" in row)
        ]
        return np.array(found, float).reshape(-1, len(keys))

    def late(self, *keys: str, learning: bool = False) -> np.ndarray:
        """The later half of `values`: the first is for finding one's feet."""
        values = self.values(*keys, learning=learning)
        return values[len(values) // 2 :]

    def setting(self, key: str, default: float) -> float:
        """A setting that is a number."""
        value = self.settings.get(key)
        return float(value) if _number(value) else default

    @property
    def iterations(self) -> int:
        return self.rows[-1]["iteration"] if self.rows else 0

    @property
    def planned(self) -> int:
        """Iterations that the run is to have."""
        return max(int(self.setting("iterations", 0)), self.iterations)


def is_run(folder: Path) -> bool:
    """Whether a folder is one of a stage."""
    return any(problem(folder / name) is None for name in (CONFIG, LOG))


def find_runs(place: str | Path) -> list[Path]:
    """The stages that a folder is or holds: a demo and `recipes/distill.py` leave several in one folder.

    Raises UserError for a place that neither is nor holds one.
    """
    folder = Path(place)
    if is_run(folder):
        return [folder]
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))
    except (OSError, ValueError):
        inner = []
    if inner:
        return inner
    state = "holds no run" if folder.is_dir() else "is no folder"
    raise UserError(f"{folder} {state}; give the out=DIR of a recipe, or the folder of a demo")


def read_series(folder: Path) -> Series:
    """All that can still be read of the stage in ``folder``."""
    notes: list[str] = []
    settings = _settings(folder, notes)
    metrics = _rows(folder / LOG, notes)
    monitor = _rows(folder / MONITOR_LOG, notes)
    rows: dict[int, dict[str, Any]] = {row["iteration"]: dict(row) for row in metrics}
    for row in monitor:
        if row["iteration"] in rows or not metrics:
            rows.setdefault(row["iteration"], {}).update(row)
    pictures = sorted(path for path in (folder / SAMPLES).glob("[0-9]*.png") if path.stem.isdigit())
    if not pictures:
        notes.append("there are no sample clips (sample_every=0, or the run has not come that far)")
    ends = [_sample(path, notes) for path in dict.fromkeys([*pictures[:1], *pictures[-1:]])]
    truth = _strips(folder / SAMPLES / TRUTH, notes) if problem(folder / SAMPLES / TRUTH) is None else None
    return Series(
        name=str(folder),
        settings=settings,
        rows=[rows[iteration] for iteration in sorted(rows)],
        written=[row["iteration"] for row in monitor],
        first=ends[0] if len(ends) > 1 else None,
        last=ends[-1] if ends else None,
        truth=None if truth is None else truth[0],
        finished=problem(folder / SUMMARY) is None and _finished(folder, notes),
        notes=notes,
    )


def _settings(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Of config.yaml, whatever version wrote it: the words alone, which no version's rules judge here."""
    try:
        words = read_yaml(folder / CONFIG)
    except Unreadable as error:
        notes.append(f"{CONFIG} cannot be read ({error.reason}): what needs settings is judged by their defaults")
        return {}
    if not isinstance(words, dict):
        notes.append(f"{CONFIG} holds no settings: what needs them is judged by their defaults")
        return {}
    version = words.pop(WRITTEN_BY, "0.1" if "stage" in words else None)
    words.pop(CONTENTS, None)
    if version != __version__:
        notes.append(f"fvgen {version} wrote this run, {__version__} reads it: what only one of them knows is left out")
    return {str(key): value for key, value in words.items()}


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The whole rows of a file of them, in its order; a last line that is cut off is the rule in a run at work."""
    if reason := problem(path):
        notes.append(f"{path.name} cannot be read ({reason})")
        return []
    try:
        lines = read_text(path, errors="replace").split("\n")
    except Unreadable as error:
        notes.append(f"{path.name} cannot be read ({error.reason})")
        return []
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, path)
        except UserError:
            row = None
        if isinstance(row, dict) and type(row.get("iteration")) is int and row["iteration"] > 0:
            rows.append(row)
        elif number == len(lines):
            notes.append(f"the last line of {path.name} is cut off: a kill, or the run is at work")
        else:
            damaged.append(number)
    if damaged:
        notes.append(f"{path.name} has {len(damaged)} damaged lines, the first is line {damaged[0]}")
    return rows


def _finished(folder: Path, notes: list[str]) -> bool:
    try:
        return bool(read_object(folder / SUMMARY))
    except Unreadable as error:
        notes.append(f"{SUMMARY} cannot be read ({error.reason})")
        return False


def _sample(path: Path, notes: list[str]) -> Sample | None:
    clips = _strips(path, notes)
    return None if clips is None else Sample(int(path.stem), clips)


def _strips(path: Path, notes: list[str]) -> np.ndarray | None:
    """What `fvgen.distill.monitor.write_strips` wrote, [S, F, H, W, 3]."""
    try:
        with open_image(path) as image:
            text = getattr(image, "text", {})
            strips, frames = int(text["strips"]), int(text["frames"])
            width, height = image.size
            if not 0 < width * height <= MOST_PIXELS or frames < 1 or strips < 1 or width % frames or height % strips:
                raise ValueError("its size does not fit its frames")
            pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    except KeyError:
        notes.append(f"{path.parent.name}/{path.name} does not say how many frames it has: an older fvgen wrote it")
    except Exception as error:  # whatever PIL's decoders raise
        notes.append(f"{path.parent.name}/{path.name} cannot be read ({first_line(error)})")
    else:
        shape = (strips, height // strips, frames, width // frames, 3)
        return pixels.reshape(shape).transpose(0, 2, 1, 3, 4)
    return None


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
