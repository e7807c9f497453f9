"""What three seeds say: differences paired by seed, and whether an order that a paper reports is found again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from scipy.stats import t as student_t

HIGHER = {"psnr", "ssim", "saved"}  # of these more is better, of all others less


def paired(ours: Sequence[float | None], others: Sequence[float | None]) -> dict[str, float] | None:
    """``ours`` minus ``others``, seed by seed: mean, half width of the 95 % interval (Student's t; NaN for one seed)
    and the mean relative to the others'. None where a value is missing."""
    if not ours or None in ours or None in others:
        return None
    differences = [a - b for a, b in zip(ours, others, strict=True)]
    count, mean = len(differences), statistics.mean(differences)
    half = math.nan
    if count > 1:
        half = float(student_t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return {"mean": mean, "half_width": half, "relative": mean / statistics.mean(others)}


def verdict(difference: dict[str, float] | None, metric: str) -> str:
    """Whether "ours is better" is reproduced, not reproduced (the contrary is clear), or undecided."""
    if difference is None or math.isnan(difference["half_width"]):
        return "undecided"
    gain = difference["mean"] if metric in HIGHER else -difference["mean"]
    if gain > difference["half_width"]:
        return "reproduced"
    return "not reproduced" if gain < -difference["half_width"] else "undecided"


def psnr_at_equal_lpips(curve: Sequence[tuple[float, float]], lpips: float) -> float | None:
    """PSNR that the teacher's curve of (LPIPS, PSNR) by number of steps has at an LPIPS: linear between its points,
    None beyond its ends, where the teacher has no such LPIPS."""
    points = sorted(curve)
    for (low, psnr_low), (high, psnr_high) in pairwise(points):
        if low <= lpips <= high:
            share = 0.0 if high == low else (lpips - low) / (high - low)
            return psnr_low + share * (psnr_high - psnr_low)
    return None
