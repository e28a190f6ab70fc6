"""Bins of about equal count in one pass, against the fold whose edges are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calibration.evaluation.variances import VarianceSums
from calibration.metrics.uce import variance_bins
from posthoc.contract import DataError
from posthoc.folds import run

numbers = st.floats(0, 1e6, width=32)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    arrays.arrays(np.float32, st.integers(1, 200), elements=numbers),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_any_batches_give_what_the_fold_gives_with_the_same_edges(
    variance: np.ndarray, parts: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    error = rng.exponential(1, len(variance))
    sums = VarianceSums()
    for piece in np.array_split(rng.permutation(len(variance)), parts):
        sums.add(error[piece], variance[piece])
    got = sums.totals()
    want = run(variance_bins(got.edges), [{"squared_error": error, "variance": variance}])
    np.testing.assert_array_equal(got.count, want.count)
    assert (got.count > 0).all() and len(got.count) <= 20
    np.testing.assert_allclose(got.squared_error_sum, want.squared_error_sum)
    np.testing.assert_allclose(got.variance_sum, want.variance_sum)
    record = sums.record("x")
    assert max(variance) <= record.upper[-1] and sum(record.count) == len(variance)


def test_bins_are_of_about_equal_count_and_the_uce_is_theirs() -> None:
    rng = np.random.default_rng(0)
    variance = rng.gamma(2, 1, 20_000)
    error = variance * rng.chisquare(1, 20_000)
    sums = VarianceSums()
    sums.add(error.reshape(2, -1), variance.reshape(2, -1))
    t = sums.totals()
    assert len(t.count) == 20 and t.count.min() > 900 and t.count.max() < 1100
    gaps = [abs(s - v) for s, v in zip(t.squared_error_sum, t.variance_sum, strict=True)]
    assert sums.uce == pytest.approx(sum(gaps) / 20_000)
    assert sums.uce < 0.1 < of(error, 2 * variance).uce


def of(error: np.ndarray, variance: np.ndarray) -> VarianceSums:
    sums = VarianceSums()
    sums.add(error, variance)
    return sums


def test_pixels_without_truth_are_left_out_and_bad_ones_refused() -> None:
    sums = VarianceSums()
    with pytest.raises(DataError, match="at least one pixel"):
        sums.totals()
    sums.add(np.array([1.0, np.nan]), np.array([2.0, np.nan]))
    assert sums.totals().n == 1
    with pytest.raises(DataError, match="below 0"):
        sums.add(np.array([1.0]), np.array([-1.0]))
