"""What a run logged, over its iterations, as drawings: a calm line, and a band for what it leaves out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MOST_POINTS = 120
COLORS = 6  # that a page has
NEIGHBOURS = 5  # at least, of which a mean is drawn
LOG_RATIO = 30  # a number that spans more than this factor gets a logarithmic axis

TITLES = {  # of what is drawn, in this order: title, and what to look for
    "loss_head": ("Head", "how badly it tells real from generated clips; guessing has 0.69 by pairs, else 1.39"),
    "loss_student_gan": ("Student: adversarial", "how little the head takes its clips for real"),
    "loss_student_dmd": (
        "Student: distribution matching",
        "size of the pull between real and fake score; no distance, it need not fall",
    ),
    "loss_student_regression": ("Student: regression", "mean squared error to the true latents"),
    "loss_student": ("Student: all it learns from", "the weighted sum"),
    "loss_fake_score": ("Fake score", "error in denoising the student's clips; answering nothing has about 1"),
    "loss_features": ("Fake score: features", "the head's loss, as its features could lower it"),
    "loss_r1": ("Head: gradient penalty", "how steep it is around real clips"),
    "head_pair_accuracy": ("Pairs the head orders rightly", "guessing has 0.5; 1 in every pair is a head that has won"),
    "gradient_dmd": ("Pull of distribution matching", "in units of the distance from student to teacher"),
    "gradient_gan": ("Pull of the head", "as weighted, in the same units"),
    "camera_heeded": ("Worth of the camera", "how much larger the loss is along another clip's path, as a share of it"),
    "student_std": ("Contrast of the student's latents", "to stay near that of real ones"),
    "seed_spread": ("Difference between two seeds", "in units of the clip's own contrast; 0 is mode collapse"),
}


@dataclass(frozen=True)
class Line:
    """``label``: whose it is; ``color``: place of its group among all. ``line``, ``band``: SVG point lists in the unit
    square, y pointing down."""

    label: str
    color: int
    line: str
    band: str


@dataclass(frozen=True)
class Curve:
    """A number, ready to draw: its name in the log, title, explanation, lines, and (position, text) ticks."""

    name: str
    title: str
    about: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]

    @property
    def line(self) -> str:
        return self.lines[0].line

    @property
    def band(self) -> str:
        return self.lines[0].band


@dataclass(frozen=True)
class Band:
    """Points (x, middle, low, high), [n] each, and the first and last iteration that they are of."""

    x: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ends: tuple[float, float]


Rows = Sequence[Mapping[str, float]]


def loss_curves(metrics: Rows) -> list[Curve]:
    """One `Curve` of one run for each key that contains ``loss`` and has at least two finite values."""
    return curves({"": [metrics]}, [name for row in metrics for name in row if "loss" in name])


def curves(groups: Mapping[str, Sequence[Rows]], names: Iterable[str]) -> list[Curve]:
    """A `Curve` for each of ``names`` with at least two finite values, in the order of `TITLES`: a line for each group
    of runs (seeds of one method, say).

    The line is the mean over neighbouring iterations: a twentieth of the run, and `NEIGHBOURS` at least. The band of
    one run is their 10th to 90th percentile; of several the lowest to the highest of their lines.
    """
    order = [*TITLES, *sorted(set(names) - set(TITLES))]
    found = []
    for name in sorted(set(names), key=order.index):
        bands = {label: band for label, runs in groups.items() if (band := _group(runs, name)) is not None}
        if bands:
            found.append(_curve(name, bands, list(groups)))
    return found


def _group(runs: Sequence[Rows], name: str) -> Band | None:
    """Of one number in several runs; None where no run has two values of it."""
    parts = [band for rows in runs if (band := _calm(*_points(rows, name))) is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    start, end = max(part.x[0] for part in parts), min(part.x[-1] for part in parts)  # where all of them are
    x = np.unique(np.concatenate([part.x for part in parts]))
    x = x[(x >= start) & (x <= end)]
    if len(x) < 2:
        return parts[0]
    x = x[np.linspace(0, len(x) - 1, min(MOST_POINTS, len(x))).round().astype(int)]
    each = np.stack([np.interp(x, part.x, part.middle) for part in parts])
    ends = min(part.ends[0] for part in parts), max(part.ends[1] for part in parts)
    return Band(x, each.mean(0), each.min(0), each.max(0), ends)


def _points(metrics: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of one number, finite ones only; it need not be in every row."""
    pairs = [(row.get("iteration", i), row[name]) for i, row in enumerate(metrics) if row.get(name) is not None]
    pairs = [(x, y) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]
    return np.array([x for x, _ in pairs], float), np.array([y for _, y in pairs], float)


def _calm(x: np.ndarray, y: np.ndarray) -> Band | None:
    """Mean and 10th to 90th percentile of the neighbours of points along x, in all of the run alike."""
    if len(x) < 2:
        return None
    reach = max(NEIGHBOURS, len(x) // 20) // 2
    centers = np.linspace(0, len(x) - 1, min(MOST_POINTS, len(x))).round().astype(int)
    ends = float(x[0]), float(x[-1])
    if len(x) <= NEIGHBOURS:
        return Band(x, y, y, y, ends)
    parts = [slice(max(0, c - reach), c + reach + 1) for c in centers]
    middle = np.array([y[part].mean() for part in parts])
    low, high = (np.array([np.percentile(y[part], q) for part in parts]) for q in (10, 90))
    at = np.array([x[part].mean() for part in parts])
    return Band(at, middle, np.minimum(low, middle), np.maximum(high, middle), ends)


def _curve(name: str, bands: Mapping[str, Band], labels: Sequence[str]) -> Curve:
    low, high = min(band.low.min() for band in bands.values()), max(band.high.max() for band in bands.values())
    left, right = min(band.ends[0] for band in bands.values()), max(band.ends[1] for band in bands.values())
    logarithmic = low > 0 and high / low > LOG_RATIO
    ticks = decades(low, high) if logarithmic else round_numbers(low, high)
    to_axis = np.log10 if logarithmic else np.asarray
    bottom, top = to_axis(min(low, ticks[0])), to_axis(max(high, ticks[-1]))

    def place_x(values: Iterable[float]) -> np.ndarray:
        return (np.asarray(values, float) - left) / max(right - left, 1e-9)

    def place_y(values: Iterable[float]) -> np.ndarray:
        return 1 - (to_axis(np.asarray(values, float)) - bottom) / max(top - bottom, 1e-9)

    lines = []
    for label, band in bands.items():
        px = place_x(band.x)
        edge = np.concatenate([np.stack([px, place_y(band.high)], 1), np.stack([px, place_y(band.low)], 1)[::-1]])
        color = labels.index(label) % COLORS
        lines.append(Line(label, color, _svg_points(np.stack([px, place_y(band.middle)], 1)), _svg_points(edge)))
    x_ticks = [value for value in round_numbers(left, right) if left <= value <= right]
    title, about = TITLES.get(name, (name.replace("_", " "), ""))
    return Curve(
        name=name,
        title=title,
        about=about,
        lines=lines,
        x_ticks=[(float(p), f"{value:g}") for p, value in zip(place_x(x_ticks), x_ticks, strict=True)],
        y_ticks=[(float(p), f"{value:g}") for p, value in zip(place_y(ticks), ticks, strict=True)],
    )


def round_numbers(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten, covering low to high."""
    span = max(high - low, abs(high) * 1e-6, 1e-12)
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * count >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.6g}") for i in range(first, max(last, first + 1) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from at or below low to at or above high."""
    return [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _svg_points(xy: np.ndarray) -> str:
    return " ".join(f"{x:.4f},{y:.4f}" for x, y in xy)
