"""Whether an order that a paper reports is found again, and the teacher's curve between two metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from fvgen.metrics.intervals import HIGHER


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
