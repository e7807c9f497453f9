"""Intervals over seeds and clips are Student's."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from fvgen.metrics.intervals import half_width, paired


def test_the_interval_is_the_paired_t_tests():
    ours, others = [0.19, 0.20, 0.185], [0.21, 0.205, 0.204]
    found = paired(ours, others)
    expected = stats.ttest_rel(ours, others).confidence_interval(0.95)
    assert found["mean"] - found["half_width"] == pytest.approx(expected.low)
    assert found["mean"] + found["half_width"] == pytest.approx(expected.high)
    assert paired([0.1, None, 0.1], others) is None and paired([], []) is None
    assert math.isnan(paired([1.0], [2.0])["half_width"])


def test_the_interval_of_a_mean_is_the_t_tests():
    values = [3.0, 5.0, 4.0, 8.0]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert half_width(values) == pytest.approx((expected.high - expected.low) / 2)
    assert math.isnan(half_width([1.0])) and half_width([2.0, 2.0]) == 0
