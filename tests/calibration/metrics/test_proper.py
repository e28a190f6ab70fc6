"""Proper scores against their defining integrals and against scipy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.metrics import brier_score_loss

from calibration.metrics.proper import brier_score, gaussian_crps, gaussian_log_loss


@settings(deadline=None, derandomize=True, max_examples=30)
@given(error=st.floats(-20, 20), std=st.floats(0.05, 10))
def test_crps_is_the_integral_of_the_squared_cdf_gap(error: float, std: float) -> None:
    below = quad(lambda t: norm.cdf(t / std) ** 2, -40 * std - 40, error, limit=200)[0]
    above = quad(lambda t: norm.sf(t / std) ** 2, error, 40 * std + 40, limit=200)[0]
    got = gaussian_crps(np.array([error]), np.array([std]))
    assert got[0] == pytest.approx(below + above, abs=1e-5)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(error=st.floats(-1e3, 1e3), std=st.floats(1e-3, 1e3))
def test_log_loss_is_scipys_density(error: float, std: float) -> None:
    got = gaussian_log_loss(np.array([[error]]), np.array([[std]]))
    assert got[0, 0] == pytest.approx(-norm.logpdf(error, scale=std), rel=1e-9, abs=1e-9)


def test_crps_of_a_certain_prediction_is_the_absolute_error() -> None:
    error = np.array([0.0, 2.0, -3.5])
    np.testing.assert_allclose(gaussian_crps(error, np.zeros(3)), np.abs(error), atol=1e-30)
    assert np.isfinite(gaussian_log_loss(error, np.zeros(3))).all()


def test_brier_is_the_sum_of_one_hot_scores() -> None:
    rng = np.random.default_rng(0)
    p, y = rng.dirichlet(np.ones(5), 200), rng.integers(0, 5, 200)
    want = sum(brier_score_loss(y == c, p[:, c]) for c in range(5))
    assert brier_score(p, y).mean() == pytest.approx(want)
    assert brier_score(np.eye(5), np.arange(5)).tolist() == [0] * 5
    assert brier_score(np.eye(5), np.roll(np.arange(5), 1)).tolist() == [2] * 5


def test_the_true_distribution_scores_best() -> None:
    rng = np.random.default_rng(0)
    error = 2 * rng.standard_normal(20_000)
    for score in (gaussian_crps, gaussian_log_loss):
        means = {s: score(error, np.full(len(error), s)).mean() for s in (1.0, 1.5, 2.0, 3.0)}
        assert min(means, key=means.__getitem__) == 2.0
