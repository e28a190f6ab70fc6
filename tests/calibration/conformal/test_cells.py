"""Thresholds by class and by group are ranks among the rows of that class or group alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2, kstest

from calibration.bundle import threshold_at
from calibration.conformal.cells import (
    UNKNOWN,
    cells,
    group_codes,
    group_index,
    named_codes,
    restored,
)
from calibration.conformal.randomise import uniforms
from posthoc.contract import DataError

ALPHA = 0.1


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 20)), min_size=1, max_size=80))
def test_each_cell_has_its_own_rank(rows: list[tuple[int, int]]) -> None:
    member = np.asarray([m for m, _ in rows])
    score = np.asarray([s for _, s in rows], np.float32)
    made = cells("cluster", score, member, np.asarray([2, UNKNOWN, 0, 3, 1]), list("abcd"))
    want = []
    for cell in (2, UNKNOWN, 0, 3, 1):
        own = sorted(s for m, s in rows if cell in (UNKNOWN, m))
        rank = math.ceil((len(own) + 1) * 0.9 - 1e-9)
        want.append(math.inf if rank > len(own) else own[rank - 1])
    np.testing.assert_array_equal(made.thresholds(ALPHA), want)
    again = restored("cluster", made.names, made.tensors(), made.every)
    np.testing.assert_array_equal(again.thresholds(0.3), made.thresholds(0.3))
    records = made.records(ALPHA)
    assert [r.n for r in records] == [int((member == c).sum()) for c in range(4)]
    assert all((r.threshold is None) == (r.rank > r.n) for r in records)


def test_groups_have_one_more_for_the_rest() -> None:
    codes, of, names = group_codes(np.asarray(["south", "north", "south", "west"]))
    assert names == ("north", "south", "west") and codes.tolist() == [1, 0, 1, 2]
    score = np.asarray([3.0, 1.0, 2.0, 9.0])
    made = cells("group", score, group_index(of, codes), of, names)
    assert made.width == 4
    np.testing.assert_array_equal(
        made.thresholds(0.5), [1.0, 3.0, 9.0, threshold_at([1, 2, 3, 9], 0.5)]
    )
    assert group_index(of, np.asarray([1, 7, UNKNOWN, 0])).tolist() == [1, 3, 3, 0]
    assert named_codes(np.asarray(["west", "east"]), of, names).tolist() == [2, UNKNOWN]


def test_numbers_are_their_own_codes() -> None:
    codes, of, names = group_codes(np.asarray([40, 7, 40], np.int32))
    assert of.tolist() == [7, 40] and names == ("7", "40") and codes.tolist() == [40, 7, 40]
    assert named_codes(np.asarray([40, 3]), of, names).tolist() == [40, UNKNOWN]
    assert named_codes(np.asarray(["40", "3"]), of, names).tolist() == [40, UNKNOWN]
    with pytest.raises(DataError, match="negative"):
        group_codes(np.asarray([3, -1]))


def test_wrong_members_are_named() -> None:
    with pytest.raises(DataError, match=r"outside 0\.\.1"):
        cells("class", np.ones(2), np.asarray([0, 2]), np.arange(2), "ab")
    with pytest.raises(DataError, match="do not go together"):
        cells("class", np.ones(3), np.asarray([0, 1]), np.arange(2), "ab")


def test_every_cell_is_covered_as_often_as_promised() -> None:
    """Over 400 draws the coverage of a new row of each cell is exactly k / (n + 1); a marginal
    threshold would cover the noisy cell in three rows of four."""
    rng = np.random.default_rng(0)
    sizes, scale = np.asarray([9, 30, 61]), np.asarray([0.5, 1.0, 4.0])
    member = np.repeat(np.arange(3), sizes)
    inside = np.zeros(3, int)
    for _ in range(400):
        score = rng.exponential(scale[member])
        q = cells("class", score, member, np.arange(3), "abc").thresholds(ALPHA)
        inside += rng.exponential(scale) <= q
    exact = np.ceil((sizes + 1) * (1 - ALPHA) - 1e-9) / (sizes + 1)
    for count, p in zip(inside, exact, strict=True):
        assert binom.ppf(0.0005, 400, p) <= count <= binom.ppf(0.9995, 400, p)


def test_u_is_uniform_and_the_rows_own() -> None:
    hashes = np.arange(20_000, dtype=np.uint64)
    u = uniforms(hashes)
    assert ((u >= 0) & (u < 1)).all() and (u.astype(np.float32) == u).all()
    assert kstest(u, "uniform").pvalue > 0.01
    np.testing.assert_array_equal(u[5:9], uniforms(hashes[5:9]))
    other = uniforms(hashes, seed=1)
    table = np.histogram2d(u, other, bins=8)[0]
    assert ((table - 312.5) ** 2 / 312.5).sum() < chi2.ppf(0.999, 63)
