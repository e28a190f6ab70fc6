"""Interval score, pinball loss, sharpness and ENCE against loops, scikit-learn and identities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import mean_pinball_loss

from calibration.metrics.interval import (
    interval_score,
    interval_totals,
    pinball_loss,
    sharpness,
)
from calibration.metrics.proper import gaussian_crps
from calibration.metrics.uce import (
    equal_mass_edges,
    expected_normalised_calibration_error,
    variance_bins,
)
from posthoc.contract import DataError
from posthoc.folds import run

modest = settings(deadline=None, derandomize=True, max_examples=40)


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), cut=st.integers(0, 40))
def test_interval_score_is_two_pinballs_and_a_fold(seed: int, n: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    low, alpha = rng.normal(0, 1, (n, 2)), 0.2
    high, y = low + rng.gamma(2, 1, (n, 2)), rng.normal(0, 2, (n, 2))
    got = interval_score(low, high, y, alpha)
    # Gneiting & Raftery 2007: the sum of both ends' pinball losses, times 2/alpha.
    both = pinball_loss(low, y, alpha / 2) + pinball_loss(high, y, 1 - alpha / 2)
    np.testing.assert_allclose(got, 2 / alpha * both, atol=1e-12)
    for q, level in ((low, 0.1), (high, 0.9)):
        want = mean_pinball_loss(y, q, alpha=level)
        assert pinball_loss(q, y, level).mean() == pytest.approx(want)
    fold = interval_totals(alpha)
    parts = [
        fold.update(fold.init(), {"lower": low[p], "upper": high[p], "y": y[p]})
        for p in (slice(cut), slice(cut, None))
    ]
    totals = fold.merge(*parts)
    assert totals.n == 2 * n
    assert totals.score == pytest.approx(got.mean())
    assert totals.mean_width == pytest.approx((high - low).mean())
    assert totals.coverage == pytest.approx(((low <= y) & (y <= high)).mean())
    assert totals.below == (y < low).sum() and totals.above == (y > high).sum()


def test_the_central_interval_scores_best_and_pinballs_are_the_crps() -> None:
    y = np.random.default_rng(0).standard_normal(100_000)
    z = norm.ppf(0.95)
    made = {k: interval_score(np.full_like(y, -k * z), np.full_like(y, k * z), y, 0.1).mean()
            for k in (0.8, 1.0, 1.25)}  # fmt: skip
    assert made[1.0] == min(made.values())
    levels = (np.arange(2000) + 0.5) / 2000
    crps = 2 * np.mean([pinball_loss(norm.ppf(a), 0.7, a) for a in levels])
    assert crps == pytest.approx(float(gaussian_crps(0.7, 1.0)), rel=1e-3)


def test_unbounded_and_faulty_intervals() -> None:
    y = np.zeros(2)
    np.testing.assert_array_equal(
        interval_score(np.array([-np.inf, -1]), np.array([np.inf, 1]), y, 0.1), [np.inf, 2]
    )
    fold = interval_totals(0.1)
    assert math.isnan(run(fold, []).score) and math.isnan(run(fold, []).coverage)
    one: dict[str, Any] = {"lower": np.full(1, -np.inf), "upper": np.ones(1), "y": np.zeros(1)}
    assert run(fold, [one]).coverage == 1 and run(fold, [one]).mean_width == np.inf
    with pytest.raises(DataError, match="row 1: bounds cross"):
        interval_score(np.array([0.0, 1.0]), np.zeros(2), y, 0.1)
    for place in range(3):
        bad = [np.zeros((3, 2)) for _ in range(3)]
        bad[place][1, 1] = np.nan
        with pytest.raises(DataError, match="row 1: bounds cross, or they or y are NaN"):
            interval_score(*bad, 0.1)
    with pytest.raises(DataError, match="do not match"):
        interval_score(np.zeros(3), np.zeros(2), y, 0.1)
    for alpha in (0.0, 1.0, np.nan):
        with pytest.raises(DataError, match="strictly between"):
            interval_score(y, y, y, alpha)
        with pytest.raises(DataError, match="strictly between"):
            pinball_loss(y, y, alpha)
    with pytest.raises(DataError, match="quantiles have shape"):
        pinball_loss(np.zeros(3), y, 0.5)


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(2, 50), cut=st.integers(0, 50))
def test_sharpness_however_split(seed: int, n: int, cut: int) -> None:
    std = 1e6 + np.random.default_rng(seed).gamma(2, 1, n)  # far from 0: sums of squares round
    got = sharpness.merge(run(sharpness, [std[:cut]]), run(sharpness, [std[cut:]]))
    assert got.n == n
    assert got.mean_std == pytest.approx(std.mean())
    assert got.mean_variance == pytest.approx((std**2).mean())
    assert got.dispersion == pytest.approx(std.std(ddof=1) / std.mean(), rel=1e-6, abs=1e-15)


def test_sharpness_of_constants_and_of_nothing() -> None:
    assert run(sharpness, [np.full((5, 2), 3.0)]).dispersion == 0
    nothing = run(sharpness, [np.zeros(0)])
    assert math.isnan(nothing.mean_std) and math.isnan(nothing.mean_variance)
    assert math.isnan(run(sharpness, [np.ones(1)]).dispersion)
    assert math.isnan(run(sharpness, [np.zeros(4)]).dispersion)
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(DataError, match="standard deviation is"):
            run(sharpness, [np.array([1.0, bad])])


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 80), cut=st.integers(0, 80))
def test_ence_by_a_slow_loop_however_split(seed: int, n: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    variance = rng.gamma(2, 1, n) if seed % 2 else rng.integers(1, 4, n).astype(float)
    error = variance * rng.chisquare(1, n)
    edges = equal_mass_edges(variance, 5)
    index = np.searchsorted(edges, variance)
    each = []
    for b in set(index.tolist()):
        rmv, rmse = (math.sqrt(v[index == b].mean()) for v in (variance, error))
        each.append(abs(rmv - rmse) / rmv)
    assert expected_normalised_calibration_error(error, variance, 5) == pytest.approx(np.mean(each))
    fold = variance_bins(edges)
    parts = [
        fold.update(fold.init(), {"squared_error": error[p], "variance": variance[p]})
        for p in (slice(cut), slice(cut, None))
    ]
    assert fold.merge(*parts).ence == pytest.approx(np.mean(each))


def test_ence_of_perfect_scaled_and_degenerate_variances() -> None:
    rng = np.random.default_rng(0)
    variance = rng.gamma(2, 1, 200_000)
    error = variance * rng.chisquare(1, 200_000)
    perfect = expected_normalised_calibration_error(error, variance)
    assert perfect == pytest.approx(math.sqrt(1 / (math.pi * 10_000)), rel=0.5)
    assert expected_normalised_calibration_error(error, 4 * variance) == pytest.approx(
        0.5, abs=0.01
    )
    zeros = np.zeros(4)
    assert expected_normalised_calibration_error(zeros, zeros) == 0
    assert expected_normalised_calibration_error(np.ones(4), zeros) == np.inf
    assert math.isnan(expected_normalised_calibration_error(np.zeros(0), np.zeros(0)))
    with pytest.raises(DataError, match="below 0"):
        expected_normalised_calibration_error(np.ones(2), -np.ones(2))
