"""The Brier score's parts: their identity, slow loops, scikit-learn, and bad rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from calibration.metrics.brier import BrierTotals, brier_parts
from calibration.metrics.totals import bin_index
from posthoc.contract import F64, I64, DataError
from posthoc.folds import run

modest = settings(deadline=None, derandomize=True, max_examples=40)


def rows(n: int, c: int, seed: int) -> tuple[F64, I64]:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(c, 0.4), n)
    probs[rng.random(n) < 0.2] = np.eye(c)[0]  # exact zeros and ones
    return probs, rng.integers(0, c, n)


def parts(probs: F64, y: I64) -> BrierTotals:
    return run(brier_parts(probs.shape[1]), [{"probs": probs, "y": y}])


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 80), c=st.integers(2, 5))
def test_the_parts_sum_to_the_score_of_scikit_learn(seed: int, n: int, c: int) -> None:
    probs, y = rows(n, c, seed)
    got = parts(probs, y)
    want = ((probs - np.eye(c)[y]) ** 2).sum(axis=1).mean()
    if c > 2:
        assert want == pytest.approx(brier_score_loss(y, probs, labels=range(c)))
    else:
        assert want == pytest.approx(2 * brier_score_loss(y, probs[:, 1], labels=[0, 1]))
    assert got.brier == pytest.approx(want, abs=1e-12)
    whole = got.reliability - got.resolution + got.uncertainty
    within = got.within_variance - got.within_covariance
    assert whole + within == pytest.approx(want, abs=1e-12)
    assert got.reliability - got.generalised_resolution + got.uncertainty == pytest.approx(want)
    assert min(got.reliability, got.resolution, got.uncertainty, got.within_variance) > -1e-12


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(2, 60), cut=st.integers(0, 60))
def test_each_part_by_a_slow_loop_however_split(seed: int, n: int, cut: int) -> None:
    probs, y = rows(n, 3, seed)
    fold = brier_parts(3)
    a, b = (
        fold.update(fold.init(), {"probs": probs[part], "y": y[part]})
        for part in (slice(cut), slice(cut, None))
    )
    merged = fold.merge(a, b)
    reliability = resolution = uncertainty = variance = covariance = 0.0
    for c in range(3):
        p, hit = probs[:, c], (y == c).astype(float)
        uncertainty += hit.mean() * (1 - hit.mean())
        for k in set(bin_index(p)):
            inside = bin_index(p) == k
            f, o, share = p[inside].mean(), hit[inside].mean(), inside.mean()
            reliability += share * (f - o) ** 2
            resolution += share * (o - hit.mean()) ** 2
            variance += share * ((p[inside] - f) ** 2).mean()
            covariance += share * 2 * ((p[inside] - f) * (hit[inside] - o)).mean()
    for got in (parts(probs, y), merged):
        assert got.n == n
        assert got.reliability == pytest.approx(reliability, abs=1e-12)
        assert got.resolution == pytest.approx(resolution, abs=1e-12)
        assert got.uncertainty == pytest.approx(uncertainty, abs=1e-12)
        assert got.within_variance == pytest.approx(variance, abs=1e-12)
        assert got.within_covariance == pytest.approx(covariance, abs=1e-12)


def test_oracle_and_climatology() -> None:
    y = np.repeat([0, 1, 2], [50, 30, 20])
    sure = parts(np.eye(3)[y], y)
    assert (sure.brier, sure.reliability, sure.skill) == (0, 0, 1)
    assert sure.resolution == pytest.approx(sure.uncertainty)
    shares = parts(np.tile([0.5, 0.3, 0.2], (100, 1)), y)
    assert shares.uncertainty == pytest.approx(1 - 0.25 - 0.09 - 0.04)
    assert shares.skill == pytest.approx(0) and shares.resolution == pytest.approx(0)


def test_float32_probabilities_are_binned_as_float64() -> None:
    probs, y = rows(500, 4, 0)
    halved = (np.round(probs * 20) / 20).astype(np.float32)  # on the edges
    halved[:, 0] = 1 - halved[:, 1:].sum(axis=1)
    keep = (halved >= 0).all(axis=1)
    single, double = parts(halved[keep], y[keep]), parts(halved[keep].astype(np.float64), y[keep])
    np.testing.assert_array_equal(single.bins.count, double.bins.count)
    assert single.reliability == double.reliability


def test_degenerate_rows() -> None:
    nothing = run(brier_parts(3), [])
    assert all(math.isnan(v) for v in (nothing.brier, nothing.reliability, nothing.resolution))
    assert math.isnan(nothing.uncertainty) and math.isnan(nothing.skill)
    one_class = parts(np.array([[0.7, 0.3], [0.9, 0.1]]), np.zeros(2, np.int64))
    assert one_class.uncertainty == 0 and math.isnan(one_class.skill)
    fold = brier_parts(2)
    assert fold.update(fold.init(), {"probs": np.zeros((0, 2)), "y": np.zeros(0, int)}).n == 0


@pytest.mark.parametrize(
    ("probs", "y", "message"),
    [
        ([[0.5, 0.5], [0.7, 0.7]], [0, 1], "row 1: probabilities sum to 1.4"),
        ([[0.5, 0.5], [np.nan, 0.5]], [0, 1], "row 1: probabilities sum to nan"),
        ([[1.5, -0.5]], [0], "row 0: probability -0.5 lies outside"),
        ([[0.5, 0.5]], [2], "row 0: label 2"),
        ([[0.2, 0.3, 0.5]], [0], "probs have shape"),
        ([[0.5, 0.5]], [0, 1], "probs have shape"),
    ],
)
def test_bad_rows_are_named(probs: list[list[float]], y: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(brier_parts(2), [{"probs": np.array(probs), "y": np.array(y)}])
