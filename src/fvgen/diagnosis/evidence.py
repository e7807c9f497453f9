"""What a pattern is recognised by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import norm


@dataclass(frozen=True)
class Evidence:
    """``says``: one clause with the number that shows it; ``value``: that number; ``limit``: what it is beyond.
    ``level``: where it differs from the pattern's own."""

    says: str
    value: float
    limit: float
    level: str | None = None


def share_interval(right: float, of: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in ``of`` cases (Wilson 1927); (0, 1) of none."""
    if of < 1:
        return 0.0, 1.0
    z = float(norm.ppf(0.975))
    middle = (right + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(right * (1 - right) / of + z * z / (4 * of * of))
    return middle - half, middle + half
