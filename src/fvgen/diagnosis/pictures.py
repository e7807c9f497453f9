"""Patterns of the sample clips, [S, F, H, W, 3] in [0, 1], beside the true clip [F, H, W, 3] where one is kept."""

from __future__ import annotations

import numpy as np

from fvgen.diagnosis.evidence import Evidence
from fvgen.diagnosis.series import Series

LEVEL = 1 / 255  # what the pictures can hold


def within(clip: np.ndarray) -> float:
    """Contrast within frames: the standard deviation over a frame's places, mean over frames and colours."""
    return float(clip.std(axis=(-3, -2)).mean())


def between(clip: np.ndarray) -> float:
    """Mean absolute change from a frame to the next."""
    return float(np.abs(np.diff(clip, axis=-4)).mean()) if clip.shape[-4] > 1 else 0.0


def one_colour(series: Series) -> Evidence | None:
    ours, true = within(series.last.clips), None if series.truth is None else within(series.truth)
    limit = 2 * LEVEL if true is None else 0.1 * true
    if ours > limit:  # a clip of one colour is what a flat truth asks for
        return None
    if true is not None and true < 4 * LEVEL:
        return None
    return Evidence(_beside("contrast within frames", ours, true, series), ours, limit)


def static(series: Series) -> Evidence | None:
    if series.last.clips.shape[1] < 2 or one_colour(series) is not None:
        return None
    ours, true = between(series.last.clips), None if series.truth is None else between(series.truth)
    limit = LEVEL if true is None else 0.1 * true
    if ours > limit or (true is not None and true < 2 * LEVEL):
        return None
    return Evidence(_beside("change from frame to frame", ours, true, series), ours, limit)


def brightness(series: Series) -> Evidence | None:
    now = float(series.last.clips.mean())
    if series.truth is not None:
        before, what = float(series.truth.mean()), "the true clip's"
    elif series.first is not None:
        before, what = float(series.first.clips.mean()), f"that of iteration {series.first.iteration}"
    else:
        return None
    if abs(now - before) <= 0.1:
        return None
    return Evidence(
        f"mean brightness {now:.2f} at iteration {series.last.iteration}, {what} {before:.2f}", now - before, 0.1
    )


def seeds_agree(series: Series) -> Evidence | None:
    spread = series.values("seed_spread")[:, 0]
    now, first = float(spread[-1]), float(spread[0])
    if now >= 0.01 and now >= 0.1 * first:
        return None
    limit = max(0.01, 0.1 * first)
    return Evidence(
        f"seed_spread is {now:.2g}, it was {first:.2g} at first" if len(spread) > 1 else f"seed_spread is {now:.2g}",
        now,
        limit,
    )


def _beside(what: str, ours: float, true: float | None, series: Series) -> str:
    beside = "" if true is None else f", the true clip's {255 * true:.3g}"
    return f"{what} {255 * ours:.3g} of 255 at iteration {series.last.iteration}{beside}"
