"""How far a mean may be off: intervals over seeds or clips, and differences paired by them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student_t

HIGHER = frozenset({"psnr", "ssim", "saved", "camera_gain"})
"""Of these metrics more is better, of all others less."""


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the values' mean (Student's t); NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def paired(ours: Sequence[float | None], others: Sequence[float | None]) -> dict[str, float] | None:
    """``ours`` minus ``others``, one by one: mean and half width of the 95 % interval (Student's t; NaN for one pair).
    None where a value is missing."""
    if not ours or None in ours or None in others:
        return None
    differences = [a - b for a, b in zip(ours, others, strict=True)]
    return {"mean": statistics.mean(differences), "half_width": half_width(differences)}
