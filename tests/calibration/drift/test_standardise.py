"""Centre and spread against scipy, and what an outlier does to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from calibration.drift.standardise import Scale, observed, reference_of, scale_of, standardised
from posthoc.contract import DataError

modest = settings(deadline=None, derandomize=True, max_examples=50)


@given(st.integers(50, 300), st.integers(1, 3), st.integers(0, 1000))
@modest
def test_it_is_median_and_mad(n: int, dims: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(5, 3, size=(n, dims))
    scale = scale_of(reference_of(x))
    np.testing.assert_allclose(scale.centre, np.median(x, axis=0), rtol=1e-12)
    np.testing.assert_allclose(scale.spread, median_abs_deviation(x, scale="normal"), rtol=1e-9)
    row = tuple(x[0].tolist())
    np.testing.assert_allclose(standardised(scale, row), (x[0] - scale.centre) / scale.spread)


def test_of_a_normal_sample_it_is_the_standard_deviation() -> None:
    x = np.random.default_rng(0).normal(7, 2, size=(200_000, 1))
    scale = scale_of(x)
    assert scale.centre[0] == pytest.approx(7, abs=0.03)
    assert scale.spread[0] == pytest.approx(2, abs=0.03)


def test_outliers_of_any_size_hardly_move_it() -> None:
    x = np.random.default_rng(1).normal(size=(200, 1))
    plain = scale_of(x)
    x[::20] = 1e300
    with_ = scale_of(x)
    assert with_.centre[0] == pytest.approx(plain.centre[0], abs=0.2)
    assert with_.spread[0] == pytest.approx(plain.spread[0], abs=0.2)


def test_a_constant_column_keeps_the_spread_before() -> None:
    before = Scale((0.0, 0.0), (2.0, 5.0))
    x = np.stack((np.full(60, 0.1), np.arange(60.0)), axis=1)
    scale = scale_of(x, before)
    assert scale.centre[0] == 0.1 and scale.spread[0] == 2.0
    assert scale.spread[1] == pytest.approx(median_abs_deviation(x[:, 1], scale="normal"))
    with pytest.raises(DataError, match="dimension 0"):
        scale_of(x)


@pytest.mark.parametrize("scale", [((), ()), ((1.0,), (0.0,)), ((1.0,), (1.0, 2.0))])
def test_a_scale_has_spreads_above_0(scale: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    with pytest.raises(DataError):
        Scale(*scale)


def test_an_observation_may_come_in_any_form() -> None:
    for x in (2, 2.0, np.float32(2), np.array(2.0), [2], (np.int64(2),), np.array([[2.0]])):
        assert observed(x, 1) == (2.0,)
