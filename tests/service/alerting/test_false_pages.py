"""The expected number of false alarms, against bundles whose labels are drawn one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import betabinom, multivariate_normal, norm

from calibration.drift.alert import coverage_threshold
from service.alerting import Options, expected_false_pages
from service.alerting.false_pages import MONTH, firings


def slow_firings(window: int, k: int, z: float, steps: int, seed: int) -> float:
    """Alarms an evaluation, counted on one long path: means of ``window`` normal draws, judged at
    each, an alarm when ``k`` in a row lie beyond z and the one before them does not."""
    draws = np.random.default_rng(seed).normal(size=steps + window)
    means = np.convolve(draws, np.ones(window), "valid") / math.sqrt(window)
    run = count = 0
    for beyond in (means > z).tolist():
        run = run + 1 if beyond else 0
        count += run == k
    return count / len(means)


@pytest.mark.parametrize(("window", "hold"), [(60, 0), (60, 10), (20, 3), (10, 30)])
def test_firings_are_those_of_a_long_path(window, hold):
    options = Options(
        windows=(f"{window}m",), alert_windows=(f"{window}m",), interval="1m", for_=f"{hold}m"
    )
    z, steps = 1.5, 400_000
    # A run as long as the window or longer is taken for one of the window.
    k = min(hold + 1, window - 1)
    counts = [slow_firings(window, k, z, steps, seed) for seed in range(3)]
    found = firings(options, f"{window}m", z) * 60 / MONTH
    spread = np.std(counts) / math.sqrt(3) + found * 0.02
    assert found == pytest.approx(np.mean(counts), abs=4 * spread + 1e-6)


def test_two_evaluations_in_a_row_have_the_bivariate_normals_probability():
    """P(beyond now, not a minute ago) from scipy's distribution function."""
    options = Options(for_="0s")
    for window, minutes in (("1h", 60), ("1d", 1440)):
        rho = 1 - 1 / minutes
        both = multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([-3, -3])
        want = (norm.cdf(-3) - both) * MONTH / 60
        assert firings(options, window, 3.0) == pytest.approx(want, rel=0.03)


def test_longer_for_and_a_wider_margin_make_fewer_and_everything_adds_up():
    base = expected_false_pages(Options())
    assert base["UQCoverageLow"] < 0.6
    assert base["UQCalibrationDegraded"] < 0.02
    assert base["UQDriftDetected"] == 0
    sooner = expected_false_pages(Options(for_="5m"))
    wider = expected_false_pages(Options(margin=3.5))
    for name in ("UQCoverageLow", "UQCalibrationDegraded"):
        assert sooner[name] > base[name] > wider[name]
    one = expected_false_pages(Options(alert_windows=("1h",)))
    other = expected_false_pages(Options(alert_windows=("1d",)))
    many = expected_false_pages(
        Options(), classifiers=2, regressors=3, levels=2, streams=6, observations=1e5
    )
    assert many["UQCoverageLow"] == pytest.approx(
        10 * (one["UQCoverageLow"] + other["UQCoverageLow"])
    )
    assert many["UQCalibrationDegraded"] == pytest.approx(2 * base["UQCalibrationDegraded"])
    assert many["UQDriftDetected"] == pytest.approx(6)


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95, 0.975, 0.99, 0.995])
@pytest.mark.parametrize("labels", [200, 300, 600, 1000, 2000, 5000])
@pytest.mark.parametrize("rows", [500, 1000])
def test_how_far_the_normal_law_is_off_for_healthy_bundles(level, labels, rows):
    """The coverage of a bundle is Beta(k, n+1-k), of its labels binomial; scipy's law of both."""
    k = math.ceil(round((rows + 1) * level, 9))
    below = math.ceil(coverage_threshold(level, labels, rows) * labels - 1e-9) - 1
    ratio = betabinom(labels, k, rows + 1 - k).cdf(below) / norm.cdf(-3)
    assert 0.2 < ratio < 1.4
    assert "0.2 to 1.4" in str(expected_false_pages.__doc__)
    # Without the term of skewness there would be more, and far more near 1.
    plain = level - 3 * math.sqrt(level * (1 - level) * (1 / labels + 1 / (rows + 2)))
    before = betabinom(labels, k, rows + 1 - k).cdf(math.ceil(plain * labels - 1e-9) - 1)
    assert before > ratio * norm.cdf(-3)
    assert level < 0.99 or before > 2 * norm.cdf(-3)
