"""The line of the coverage alert: how often does a healthy bundle fall below it?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import betabinom

from calibration.bundle import conformal_rank, threshold_at
from calibration.drift.alert import coverage_threshold
from posthoc.contract import DataError


def test_it_is_three_standard_deviations_of_both_samples() -> None:
    want = 0.9 - 3 * math.sqrt(0.9 * 0.1 / 200 + 0.9 * 0.1 / 502)
    assert coverage_threshold(0.9, 200, 500) == pytest.approx(want)
    assert coverage_threshold(0.9, 10**12, 10**12) == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize(
    ("level", "n_cal", "labels"),
    [(0.8, 200, 100), (0.9, 100, 50), (0.9, 1000, 200), (0.95, 500, 1000)],
)
def test_healthy_bundles_are_rarely_below(level: float, n_cal: int, labels: int) -> None:
    """Real calibrations, each with one window; beside it the exact law."""
    threshold, runs = coverage_threshold(level, labels, n_cal), 20_000
    rng = np.random.default_rng(0)
    below = 0
    for _ in range(runs):
        q = threshold_at(np.sort(rng.random(n_cal)), 1 - level)
        below += rng.binomial(labels, q) / labels < threshold
    k = conformal_rank(n_cal, 1 - level)
    exact = betabinom(labels, k, n_cal + 1 - k).cdf(math.ceil(threshold * labels - 1e-9) - 1)
    assert below / runs == pytest.approx(exact, abs=3.5 * math.sqrt(exact / runs))
    assert below / runs <= 0.01


def test_the_stated_false_alarms() -> None:
    for level, most, least_labels in ((0.8, 0.007, 20), (0.9, 0.007, 20), (0.95, 0.0095, 50)):
        for n_cal in (100, 200, 500, 1000, 5000):
            for labels in (20, 50, 100, 200, 500, 1000, 10_000):
                if labels < least_labels:
                    continue
                line = coverage_threshold(level, labels, n_cal)
                k = conformal_rank(n_cal, 1 - level)
                law = betabinom(labels, k, n_cal + 1 - k)
                assert law.cdf(math.ceil(line * labels - 1e-9) - 1) <= most


def test_lost_coverage_falls_below() -> None:
    rng = np.random.default_rng(0)
    covered = rng.binomial(500, 0.8, 1000) / 500
    assert (covered < coverage_threshold(0.9, 500, 1000)).mean() > 0.99


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(DataError, match="strictly between 0 and 1"):
        coverage_threshold(1.0, 10, 10)
    for labels, n_cal in ((0, 10), (10, 0), (math.nan, 10)):
        with pytest.raises(DataError, match="needs labels and calibration rows"):
            coverage_threshold(0.9, labels, n_cal)
