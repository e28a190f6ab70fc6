"""The line of the coverage alert: how often does a healthy bundle fall below it?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import betabinom

from calibration.bundle import conformal_rank, threshold_at
from calibration.drift.alert import coverage_threshold
from posthoc.contract import DataError


def test_it_is_three_standard_deviations_of_both_samples_and_their_skewness() -> None:
    spread = math.sqrt(0.9 * 0.1 / 200 + 0.9 * 0.1 / 502)
    want = 0.9 - 3 * spread - 8 / 6 * 0.8 * (1 / 200 + 2 / 502)
    assert coverage_threshold(0.9, 200, 500) == pytest.approx(want)
    assert coverage_threshold(0.9, 10**12, 10**12) == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_the_skewness_is_that_of_the_exact_law(level: float) -> None:
    """scipy's third moment of the beta-binomial law of covered labels."""
    labels, n_cal = 600, 1000
    k = conformal_rank(n_cal, 1 - level)
    law = betabinom(labels, k, n_cal + 1 - k)
    z = 3.0
    found = level - z * law.std() / labels - coverage_threshold(level, labels, n_cal)
    want = -(z**2 - 1) / 6 * float(law.stats("s")) * law.std() / labels
    assert found == pytest.approx(want, rel=0.05)


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
    assert below / runs <= 0.003


def test_the_stated_false_alarms() -> None:
    found = []
    for level in (0.6, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995):
        for n_cal in (20, 50, 100, 200, 500, 1000, 5000):
            for labels in (20, 50, 100, 200, 300, 500, 1000, 2000, 10_000):
                line = coverage_threshold(level, labels, n_cal)
                k = conformal_rank(n_cal, 1 - level)
                if k > n_cal:
                    continue  # everything is covered
                law = betabinom(labels, k, n_cal + 1 - k)
                found.append(law.cdf(math.ceil(line * labels - 1e-9) - 1))
    assert 1e-4 < min(found) < max(found) <= 0.0019
    assert "0.01 to 0.19 %" in str(coverage_threshold.__doc__)


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
