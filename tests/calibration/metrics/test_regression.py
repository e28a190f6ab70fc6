"""PIT and PCE against their definitions, scipy, and the floor of a perfect model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm

from calibration.metrics.regression import (
    PIT_BINS,
    gaussian_pit,
    observed_quantiles,
    pce_floor,
    pce_sorted,
    perfect_pce,
    pit_totals,
)
from posthoc.contract import DataError
from posthoc.folds import run


def test_pit_is_the_cdf_and_uniform_where_the_model_is_right() -> None:
    rng = np.random.default_rng(0)
    mean, std = rng.normal(0, 5, (2000, 2)), rng.gamma(2, 1, (2000, 2))
    y = mean + std * rng.standard_normal((2000, 2))
    pit = gaussian_pit(mean, std, y)
    np.testing.assert_allclose(pit, norm.cdf(y, mean, std), atol=1e-12)
    assert kstest(pit.ravel(), "uniform").pvalue > 0.01
    assert kstest(gaussian_pit(mean, 2 * std, y).ravel(), "uniform").pvalue < 1e-6


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 80), cut=st.integers(0, 80))
def test_pce_equals_the_slow_loop_however_split(seed: int, n: int, cut: int) -> None:
    pit = np.random.default_rng(seed).beta(2, 1, n)
    pit[0] = 1.0
    pce = sum(abs(j / 101 - sum(z <= j / 101 for z in pit) / n) for j in range(1, 101)) / 100
    count = [0] * PIT_BINS
    for z in pit:
        count[min(int(z * PIT_BINS), PIT_BINS - 1)] += 1
    merged = pit_totals.merge(run(pit_totals, [pit[:cut]]), run(pit_totals, [pit[cut:]]))
    for totals in (run(pit_totals, [pit]), merged):
        assert totals.n == n
        assert totals.pce == pytest.approx(pce, abs=1e-12)
        assert totals.count.tolist() == count


def test_a_perfect_model_reaches_the_floor() -> None:
    rng = np.random.default_rng(0)
    means = np.mean([run(pit_totals, [rng.random(400)]).pce for _ in range(400)])
    assert means == pytest.approx(pce_floor(400), rel=0.05)
    assert pce_floor(400) == pytest.approx(0.3133 / 20, rel=1e-3)


def test_a_recalibrated_model_reaches_the_floor_of_both_samples() -> None:
    rng, made = np.random.default_rng(0), []
    for _ in range(300):
        calibration = np.sort(rng.random(300))
        pit = np.searchsorted(calibration, rng.random(500)) / 301  # its empirical distribution
        made.append(run(pit_totals, [pit]).pce)
    assert np.mean(made) == pytest.approx(pce_floor(500, 300), rel=0.08)


def test_observed_quantiles_count_targets_below() -> None:
    rng = np.random.default_rng(0)
    levels = (0.1, 0.5, 0.9)
    y = rng.standard_normal((4000, 2))
    q = np.broadcast_to(norm.ppf(levels), (4000, 2, 3))
    np.testing.assert_allclose(observed_quantiles(q, levels, y), levels, atol=0.02)
    np.testing.assert_allclose(
        observed_quantiles(q[:, 0], levels, y[:, 0]), (y[:, :1] <= norm.ppf(levels)).mean(axis=0)
    )


def test_wrong_values_are_refused() -> None:
    with pytest.raises(DataError, match="outside"):
        run(pit_totals, [np.array([0.5, np.nan])])
    with pytest.raises(DataError, match="quantiles have shape"):
        observed_quantiles(np.zeros((5, 2)), (0.1, 0.5, 0.9), np.zeros(5))
    assert np.isnan(run(pit_totals, []).pce)


def test_sorted_pce() -> None:
    z = np.random.default_rng(0).beta(2, 3, 50)
    want = sum(abs(v - (i + 1) / 51) for i, v in enumerate(sorted(z.tolist()))) / 50
    assert pce_sorted(z.reshape(25, 2)) == pytest.approx(want)
    assert pce_sorted(np.arange(1, 10) / 10) == pytest.approx(0)
    many = np.random.default_rng(1).beta(2, 1, 200_000)
    assert pce_sorted(many) == pytest.approx(run(pit_totals, [many]).pce, rel=0.02)
    perfect = [pce_sorted(np.random.default_rng(i).random(400)) for i in range(300)]
    assert np.mean(perfect) == pytest.approx(pce_floor(400), rel=0.06)
    with pytest.raises(DataError, match="at least one PIT"):
        pce_sorted(np.zeros(0))
    for bad in (np.nan, 1.1, -0.1):
        with pytest.raises(DataError, match="outside"):
            pce_sorted(np.array([0.5, bad]))


def test_perfect_models_lie_in_the_range_of_pce() -> None:
    low, high = perfect_pce(300)
    made = [run(pit_totals, [np.random.default_rng(i).random(300)]).pce for i in range(400)]
    assert 370 <= sum(low <= p <= high for p in made) <= 396
    assert low < pce_floor(300) < high
    with pytest.raises(DataError, match="at least one row"):
        perfect_pce(0)
