"""The worst slice: exact along one direction, found where there is one, unbiased where not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.metrics.worst_slice import least_covered, worst_slice
from posthoc.contract import DataError


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 25),
    least=st.integers(1, 25),
    distinct=st.integers(1, 30),
)
def test_the_stretch_is_the_least_of_all(seed: int, n: int, least: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    least = min(least, n)
    along, covered = np.sort(rng.integers(0, distinct, n)).astype(float), rng.random(n) < 0.7
    want = min(
        covered[inside].mean()
        for a in along
        for b in along
        if (inside := (a <= along) & (along <= b)).sum() >= least
    )
    low, high, share = least_covered(along, covered, least)
    inside = (low <= along) & (along <= high)
    assert share == pytest.approx(want)
    assert inside.sum() >= least and covered[inside].mean() == pytest.approx(want)


def test_a_slice_that_is_covered_less_is_found_and_honestly_measured() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6000, 3)) * [1, 10, 0.1] + [0, 50, 0]
    bad = x[:, 2] > 0.1  # a sixth of the rows, in the smallest unit
    covered = rng.random(6000) < np.where(bad, 0.5, 0.98)
    got = worst_slice(x, covered)
    assert got.coverage < 0.75 < covered.mean()
    assert len(got.rows) >= 0.08 * 3000
    assert abs(got.direction[2]) > 0.8
    inside = got.holds(x)
    assert covered[inside].mean() < 0.75
    again = worst_slice(x, covered)
    assert (again.low, again.high, again.coverage) == (got.low, got.high, got.coverage)
    assert again.coverage == covered[again.rows].mean() and inside[again.rows].all()


def test_even_coverage_is_not_made_to_look_bad() -> None:
    chosen, measured = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x, covered = rng.standard_normal((800, 4)), rng.random(800) < 0.9
        got = worst_slice(x, covered, directions=50, seed=seed)
        chosen.append(got.chosen)
        measured.append(got.coverage)
    assert np.mean(chosen) < 0.82  # what the same rows would have said
    assert np.mean(measured) == pytest.approx(0.9, abs=0.02)


def test_groups_stay_in_one_half_and_constants_do_no_harm() -> None:
    rng = np.random.default_rng(1)
    x = np.column_stack([np.repeat(rng.standard_normal(100), 4), np.ones(400)])
    covered = np.repeat(rng.random(100) < 0.8, 4)
    groups = np.repeat(np.arange(100), 4)
    got = worst_slice(x, covered, groups=groups)
    inside = got.holds(x)
    assert len(got.rows) % 4 == 0 and np.isfinite([got.low, got.high]).all()
    assert inside.reshape(100, 4).std(axis=1).max() == 0
    flat = worst_slice(np.ones((10, 2)), np.arange(10) % 2 == 0)
    assert len(flat.rows) == 5  # rows that nothing tells apart are one slice


def test_bad_input_is_refused() -> None:
    x, covered = np.zeros((10, 2)), np.ones(10, bool)
    with pytest.raises(DataError, match="do not match"):
        worst_slice(x, covered[:5])
    with pytest.raises(DataError, match="row 3: a feature"):
        worst_slice(np.where(np.arange(10)[:, None] == 3, np.nan, x), covered)
    with pytest.raises(DataError, match="least share"):
        worst_slice(x, covered, share=0)
    with pytest.raises(DataError, match="at least two rows"):
        worst_slice(x[:3], covered[:3])
    with pytest.raises(DataError, match="at least one direction"):
        worst_slice(x, covered, directions=0)
