"""Comparisons with the best: Holm by its definition, intervals and p-values that hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.metrics.bootstrap import paired_difference
from calibration.metrics.comparison import against_best, holm
from posthoc.contract import DataError


@settings(deadline=None, derandomize=True, max_examples=80)
@given(p=st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_step_by_step(p: list[float]) -> None:
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.2, 0.7):
        rejected: set[int] = set()
        for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] * (len(p) - step) > level:
                break
            rejected.add(i)
        assert set(np.flatnonzero(adjusted <= level).tolist()) == rejected


def test_holm_of_nothing_and_of_no_p_values() -> None:
    assert holm([]).tolist() == []
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    for bad in (np.nan, -0.1, 1.1):
        with pytest.raises(DataError, match="p-values"):
            holm([0.5, bad])


def test_differences_are_the_paired_ones() -> None:
    rng = np.random.default_rng(0)
    base = rng.gamma(2, 1, 500)
    losses = {"b": base + rng.normal(0.3, 0.5, 500), "a": base, "c": base + rng.normal(0, 1, 500)}
    losses["c"] += base.mean() - losses["c"].mean() + 1e-4
    got = against_best(losses, n_boot=400)
    assert (got["a"].difference.value, got["a"].difference.high, got["a"].p_value) == (0, 0, 1)
    assert got["b"].p_value <= 2 * 2 / 401 and got["b"].difference.low > 0
    assert got["c"].p_value > 0.3 and got["c"].difference.low < 0 < got["c"].difference.high
    want = paired_difference(losses["b"], base, n_boot=400)
    assert got["b"].difference.low == pytest.approx(want.low, abs=1e-9)
    assert got["b"].difference.high == pytest.approx(want.high, abs=1e-9)
    groups = np.repeat(np.arange(50), 10)
    wide = against_best(losses, groups=groups, n_boot=400)
    assert wide["b"].difference.value == got["b"].difference.value


def test_p_values_are_counted_resample_by_resample() -> None:
    rng = np.random.default_rng(0)
    n, boots = 60, 199
    losses = {k: rng.normal(m, 1, n) for k, m in (("a", 0.0), ("b", 0.2), ("c", 0.4), ("d", 9.0))}
    groups = np.repeat(np.arange(20), 3)
    for given_groups, members in ((None, [[i] for i in range(n)]), (groups, None)):
        rows = members or [np.flatnonzero(groups == g).tolist() for g in range(20)]
        got = against_best(losses, groups=given_groups, n_boot=boots, seed=3)
        best = min(losses, key=lambda k: losses[k].mean())
        others = [k for k in losses if k != best]
        draw, not_above = np.random.default_rng(3), dict.fromkeys(others, 0)
        for _ in range(boots):
            taken = [i for g in draw.integers(0, len(rows), len(rows)) for i in rows[g]]
            for k in others:
                not_above[k] += bool(np.mean([losses[k][i] - losses[best][i] for i in taken]) <= 0)
        raw = {k: min(1.0, 2 * (1 + not_above[k]) / (boots + 1)) for k in others}
        adjusted, running = {}, 0.0
        for step, k in enumerate(sorted(others, key=raw.__getitem__)):
            running = max(running, min(1.0, raw[k] * (len(others) - step)))
            adjusted[k] = running
        assert {k: got[k].p_value for k in others} == pytest.approx(adjusted)
        assert got["d"].p_value == pytest.approx(3 * 2 / (boots + 1))  # the least there can be
        assert got[best].p_value == 1


def test_equal_systems_are_rarely_told_apart() -> None:
    false = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        losses = {k: rng.normal(0, 1, 200) for k in "abcd"}
        false += any(
            c.p_value <= 0.05 for c in against_best(losses, n_boot=200, seed=seed).values()
        )
    # The best of four was picked on the same rows, so more than 5 %, and the docstring says so.
    assert false <= 30


def test_bad_losses_are_refused() -> None:
    with pytest.raises(DataError, match="same rows"):
        against_best({"a": np.zeros(3), "b": np.zeros(4)})
    with pytest.raises(DataError, match="same rows"):
        against_best({})
    with pytest.raises(DataError, match="b: a loss"):
        against_best({"a": np.zeros(3), "b": np.array([0, np.inf, 0])})
    with pytest.raises(DataError, match="at least one row"):
        against_best({"a": np.zeros(0)})
