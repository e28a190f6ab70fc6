"""Intervals against closed forms, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.metrics.bootstrap import (
    group_codes,
    mean_estimates,
    paired_difference,
    row_weights,
)
from posthoc.contract import DataError


def test_interval_of_a_mean_is_the_normal_one() -> None:
    x = np.random.default_rng(0).standard_normal(2000)
    got = mean_estimates({"x": x})["x"]
    half = 1.96 * x.std(ddof=1) / np.sqrt(2000)
    assert got.value == pytest.approx(x.mean())
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.1)


def test_mean_intervals_cover() -> None:
    hits = 0
    for seed in range(300):
        x = np.random.default_rng(seed).exponential(1.0, 300)
        got = mean_estimates({"x": x}, n_boot=200, seed=seed)["x"]
        hits += got.low <= 1.0 <= got.high
    assert hits >= 270  # four standard deviations of a 95 % count below its mean


def test_intervals_over_groups_cover_where_intervals_over_rows_do_not() -> None:
    hits = {"rows": 0, "groups": 0}
    groups = np.repeat(np.arange(60), 8)
    for seed in range(150):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(60)[groups] + 0.3 * rng.standard_normal(480)
        for name, g in (("rows", None), ("groups", groups)):
            got = mean_estimates({"x": x}, groups=g, n_boot=200, seed=seed)["x"]
            hits[name] += got.low <= 0 <= got.high
    assert hits["groups"] >= 130
    assert hits["rows"] <= 105


def test_groups_are_drawn_whole() -> None:
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    codes, n_groups = group_codes(groups, 6)
    assert n_groups == 3
    for w in row_weights(6, groups=groups, n_boot=20, seed=0):
        assert len({(int(c), float(v)) for c, v in zip(codes, w, strict=True)}) == 3
        assert w[[3, 1, 0]].sum() == 3  # one row of each group: three draws in all


def test_pairing_removes_what_the_rows_share() -> None:
    rng = np.random.default_rng(0)
    hardness = rng.gamma(1.0, 5.0, 500)
    a, b = hardness + 0.1 * rng.random(500), hardness + 0.1 * rng.random(500) + 0.05
    paired = paired_difference(a, b)
    assert paired.value == pytest.approx((a - b).mean())
    assert paired.high < 0
    own = mean_estimates({"a": a})["a"]
    assert own.high - own.low > 50 * (paired.high - paired.low)


def test_same_seed_same_interval_and_none_of_nothing() -> None:
    x = np.random.default_rng(0).random(50)
    assert paired_difference(x, 0 * x, seed=3) == paired_difference(x, 0 * x, seed=3)
    assert paired_difference(x, 0 * x, seed=3) != paired_difference(x, 0 * x, seed=4)
    same = paired_difference(x, x)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_columns_of_different_rows_are_refused() -> None:
    with pytest.raises(DataError, match="3 and 2 rows"):
        paired_difference(np.zeros(3), np.zeros(2))
    with pytest.raises(DataError, match="different lengths"):
        mean_estimates({"a": np.zeros(3), "b": np.zeros(2)})
    with pytest.raises(DataError, match="groups has 2 rows"):
        paired_difference(np.zeros(3), np.zeros(3), groups=np.zeros(2))
    with pytest.raises(DataError, match="at least one row"):
        mean_estimates({"a": np.zeros(0)})
