"""Patterns of the head and of the fake score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fvgen.diagnosis.evidence import Evidence, share_interval
from fvgen.diagnosis.series import Series
from fvgen.objectives.gan import KINDS, discriminator_loss

FEWEST = 5  # values of which a mean says something
CATCHES_UP = 15  # iterations that the tiny preset's student needs until its head, ahead by then, is back at 60 %


def guessing(series: Series) -> float | None:
    """The loss of a head whose logits are all 0; None for a kind of loss that is not known."""
    kind = series.settings.get("gan_kind", "non_saturating")
    return discriminator_loss(torch.zeros(1, 1), torch.zeros(1, 1), kind).item() if kind in KINDS else None


def head_beyond(series: Series) -> Evidence | None:
    return _head_loss(series, lambda share: share.mean() > 2, 2, "loss_head is {:.2g} times that of guessing")


def won(series: Series) -> Evidence | None:
    says = "loss_head is {:.2g} of guessing's while the student learns"
    return _head_loss(series, lambda share: share.mean() < 0.1, 0.1, says, learning=True)


def learns_nothing(series: Series) -> Evidence | None:
    rate, updates = series.setting("head_lr", 1.0), series.planned * series.setting("critic_updates", 1)
    begins = 1 / math.sqrt(27 * series.setting("head_channels", 64))  # 3x3x3 convolutions' first weights
    if (far := rate * updates) < 0.01 * begins:
        said = f"head_lr {rate:.2g} moves no weight further than {far:.2g} in {updates:.0f} updates"
        said += f"; they begin at {begins:.2g}"
        return Evidence(said, far, 0.01 * begins)
    says = "loss_head is {:.4g} times that of guessing, and nowhere 1 % away"
    return _head_loss(series, lambda share: np.abs(share - 1).max() < 0.01, 0.01, says)


def prefers_student(series: Series) -> Evidence | None:
    share, _, high = _pairs(series)
    if high >= 0.5:
        return None
    return Evidence(
        f"the head ordered {share:.0%} of the later pairs rightly (95 % interval up to {high:.0%})", share, 0.5
    )


def unheeded(series: Series) -> Evidence | None:
    if not series.setting("gan_weight", 1.0):
        return None
    share, low, _ = _pairs(series)
    if low <= 0.75 or len(series.late("head_pair_accuracy", learning=True)) < CATCHES_UP:
        return None
    return Evidence(
        f"the head ordered {share:.0%} of the later pairs rightly (95 % interval from {low:.0%})", share, 0.75
    )


def saturated(series: Series) -> Evidence | None:
    if np.ptp(series.values("weight_h")) == 0:  # every ratio weighs one
        return None
    worst = series.late("log_ratio_max")
    if len(worst) < FEWEST or np.median(worst) <= 5:
        return None
    value = float(np.median(worst))
    return Evidence(
        f"log_ratio_max is {value:.1f} in the median: a ratio of e^{value:.1f} = {math.exp(value):.3g}", value, 5
    )


def fake_beyond(series: Series) -> Evidence | None:
    losses, sizes = series.late("loss_fake_score")[:, 0], series.late("student_std")[:, 0]
    if len(losses) < FEWEST:
        return None
    silence = max(1.0, float(np.median(sizes)) ** 2 if len(sizes) else 1.0)
    value = float(np.median(losses)) / silence
    if value <= 1:
        return None
    return Evidence(f"loss_fake_score is {np.median(losses):.3g}, that of no answer at all {silence:.3g}", value, 1)


def fake_behind(series: Series) -> Evidence | None:
    errors = series.late("error_fake", "error_teacher")
    if len(errors) < FEWEST or errors[:, 1].sum() <= 0:
        return None
    ratio = float(errors[:, 0].sum() / errors[:, 1].sum())
    if ratio <= 1.5:
        return None
    fake, teacher = errors.mean(axis=0)
    return Evidence(
        f"it is off by {fake:.3g} (mean square), the teacher by {teacher:.3g}: {ratio:.2g} times", ratio, 1.5
    )


def matching_silent(series: Series) -> Evidence | None:
    size = series.late("gradient_dmd")
    if len(size) < FEWEST or size.mean() >= 0.1:
        return None
    return Evidence(f"gradient_dmd is {size.mean():.2g} of the teacher-student gap", float(size.mean()), 0.1)


def matching_wild(series: Series) -> Evidence | None:
    size = series.late("gradient_dmd")
    if len(size) < FEWEST or np.median(size) <= 3:
        return None
    return Evidence(f"gradient_dmd is {np.median(size):.2g} times the teacher-student gap", float(np.median(size)), 3)


def matching_drowned(series: Series) -> Evidence | None:
    if series.settings.get("balance"):  # the gradient that is watched is not yet balanced
        return None
    sizes = series.late("gradient_gan", "gradient_dmd")
    matching = np.median(sizes[:, 1]) * series.setting("dmd_weight", 1.0) if len(sizes) >= FEWEST else 0
    if matching <= 0 or np.median(sizes[:, 0]) / matching <= 10:
        return None
    ratio = float(np.median(sizes[:, 0]) / matching)
    return Evidence(f"gradient_gan is {ratio:.2g} times gradient_dmd", ratio, 10)


def risen(series: Series, key: str, limit: float) -> Evidence | None:
    """A loss whose later median is ``limit`` times that of the run's first quarter."""
    values = series.values(key)[:, 0]
    late = series.late(key)[:, 0]
    if len(late) < FEWEST:
        return None
    before, now = float(np.median(values[: max(1, len(values) // 4)])), float(np.median(late))
    if before <= 0 or now / before <= limit:
        return None
    return Evidence(f"{key} rose from {before:.3g} to {now:.3g}, {now / before:.2g} times", now / before, limit)


def _head_loss(
    series: Series, is_so: Callable[[np.ndarray], Any], limit: float, says: str, learning: bool = False
) -> Evidence | None:
    """Where the head's later losses, as multiples of guessing's, are so."""
    chance, losses = guessing(series), series.late("loss_head", learning=learning)[:, 0]
    if chance is None or len(losses) < FEWEST or not is_so(losses / chance):
        return None
    value = float(losses.mean() / chance)
    return Evidence(says.format(value), value, limit)


def _pairs(series: Series) -> tuple[float, float, float]:
    """Of the later pairs, while the student learns: the share that the head ordered rightly, and its interval."""
    shares = series.late("head_pair_accuracy", learning=True)[:, 0]
    share = float(shares.mean()) if len(shares) else 0.5
    return share, *share_interval(share, round(len(shares) * series.setting("batch_size", 1)))
