"""The bounds of the expected log softmax against sampling, quadrature and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad

from posthoc.folds import log_softmax
from posthoc.methods.vbll.bound import Bound, softmax_bound

KINDS: tuple[Bound, ...] = ("tilted", "jensen")
steady = settings(deadline=None, derandomize=True, max_examples=40)


def logits(seed: int, c: int, spread: float, n: int = 5) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    m = rng.normal(size=(n, c)) * 3
    v = spread * rng.gamma(1.0, size=(n, c))
    return m, v, rng.integers(0, c, n)


@steady
@given(st.integers(0, 10**6), st.integers(2, 8), st.sampled_from([0.01, 0.5, 4.0, 60.0]))
def test_it_lies_below_the_sampled_expectation(seed: int, c: int, spread: float) -> None:
    m, v, y = logits(seed, c, spread)
    eps = np.random.default_rng(0).normal(size=(4000, 1, c))
    eps = np.concatenate([eps, -eps])
    draws = log_softmax(m + np.sqrt(v) * eps)[:, np.arange(len(y)), y]
    error = draws.std(0) / np.sqrt(len(draws))
    for kind in KINDS:
        found = softmax_bound(m, v, y, kind).value
        assert (found <= draws.mean(0) + 5 * error + 1e-12).all()


@steady
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_it_is_exact_without_variance(seed: int, c: int) -> None:
    m, v, y = logits(seed, c, 1.0)
    exact = log_softmax(m)[np.arange(len(y)), y]
    for kind in KINDS:
        np.testing.assert_allclose(softmax_bound(m, 0 * v, y, kind).value, exact, atol=1e-14)


def test_two_classes_against_quadrature() -> None:
    # E log sigmoid(d) with d Gaussian: the tilted bound must be near where Jensen's is not.
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    m, v, y = np.asarray([[4.0, 0.0]]), np.asarray([[2.0, 2.0]]), np.asarray([0])
    d = 4.0 + 2.0 * nodes  # the variance of a difference is 4
    exact = float((-np.logaddexp(0, -d) * weights).sum() / weights.sum())
    tilted, jensen = (softmax_bound(m, v, y, kind).value[0] for kind in KINDS)
    assert jensen < tilted <= exact
    assert exact - tilted < 0.05 < exact - jensen


def test_a_variance_that_classes_share_costs_the_tilted_bound_less() -> None:
    m, v, y = logits(3, 6, 3.0, 200)
    gap = softmax_bound(m, v, y, "tilted").value - softmax_bound(m, v, y, "jensen").value
    assert np.median(gap) > 0.3
    # Any tilt is a bound, also where the iteration is far from done.
    m, v, y = logits(4, 6, 300.0, 200)
    assert np.isfinite(softmax_bound(m, v, y, "tilted").value).all()


def test_it_is_stable_far_out() -> None:
    m = np.asarray([[1e4, -1e4, 0.0], [-1e4, 0.0, 5e3]])
    for kind in KINDS:
        found = softmax_bound(m, np.full((2, 3), 100.0), np.asarray([0, 1]), kind)
        for part in (found.value, found.mean, found.variance):
            assert np.isfinite(part).all()


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_the_bound(kind: Bound) -> None:
    m, v, y = logits(1, 4, 0.3, 3)
    shape = m.shape

    def value(flat: np.ndarray) -> float:
        a, b = flat.reshape(2, *shape)
        return float(softmax_bound(a, b, y, kind).value.sum())

    def gradient(flat: np.ndarray) -> np.ndarray:
        a, b = flat.reshape(2, *shape)
        found = softmax_bound(a, b, y, kind)
        by_mean = np.eye(shape[1])[y] - found.mean
        return np.concatenate([by_mean.ravel(), -0.5 * found.variance.ravel()])

    at = np.concatenate([m.ravel(), v.ravel()])
    assert check_grad(value, gradient, at) < 2e-5


def test_the_curvature_is_laplaces_where_the_variance_is_small() -> None:
    m, v, y = logits(2, 5, 1e-6)
    p = np.exp(log_softmax(m))
    found = softmax_bound(m, v, y, "tilted").variance
    np.testing.assert_allclose(found, p * (1 - p), rtol=1e-4, atol=1e-9)
