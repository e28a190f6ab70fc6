"""Coverage by set size and by group against slow loops and simulated conformal prediction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.bundle import threshold_at
from calibration.metrics.conditional_coverage import (
    coverage_by_group,
    group_counts,
    size_stratified_violation,
    strata_counts,
    violation_range,
)
from calibration.metrics.coverage import coverage_band, set_sizes
from posthoc.contract import DataError
from posthoc.folds import run

modest = settings(deadline=None, derandomize=True, max_examples=40)


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 80))
def test_violation_by_a_slow_loop(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    sets, y = rng.random((n, 6)) < rng.random((n, 1)), rng.integers(0, 6, n)
    totals = run(set_sizes(6), [{"set": sets, "y": y}])
    strata = ((0, 1), (2, 3), (4, 5))  # the last takes size 6 in
    parts: dict[int, list[bool]] = {}
    for inside, truth in zip(sets, y, strict=True):
        parts.setdefault(min(int(inside.sum()) // 2, 2), []).append(bool(inside[truth]))
    want = max(abs(np.mean(hits) - 0.9) for hits in parts.values())
    assert size_stratified_violation(totals, 0.1, strata) == pytest.approx(want)
    assert strata_counts(totals, strata) == tuple(
        (len(parts[k]), sum(parts[k])) for k in sorted(parts)
    )


def test_parts_that_are_covered_alike_lie_in_the_range() -> None:
    rng, inside = np.random.default_rng(0), 0
    counts = np.array([300, 60, 40])
    for seed in range(300):
        q = threshold_at(np.sort(rng.random(200)), 0.1)
        covered = [(rng.random(n) <= q).mean() for n in counts]
        low, high = violation_range(counts.tolist(), 200, 0.1, n_sim=400, seed=seed)
        inside += low <= max(abs(c - 0.9) for c in covered) <= high
    assert inside >= 275  # 95 % nominal
    # Sets that are certain where they are small and hopeless where they are large.
    assert violation_range([300, 60, 40], 200, 0.1)[1] < 0.4


def test_range_of_too_few_rows_and_of_none() -> None:
    assert violation_range([50], 8, 0.1) == (0.1, 0.1)
    assert math.isnan(size_stratified_violation(run(set_sizes(3), []), 0.1))
    for counts in ([], [5, 0]):
        with pytest.raises(DataError, match="at least one set"):
            violation_range(counts, 100, 0.1)


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), cut=st.integers(0, 60))
def test_groups_by_a_slow_loop_however_split(seed: int, n: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    covered, names = rng.random(n) < 0.8, rng.choice(np.array(["a", "bc", "d"]), n)
    fold = group_counts
    a = fold.update(fold.init(), {"covered": covered[:cut], "group": names[:cut]})
    b = fold.update(fold.init(), {"covered": covered[cut:], "group": names[cut:]})
    for counts in (fold.merge(a, b), run(fold, [{"covered": covered, "group": names}])):
        found = {p.name: p for p in coverage_by_group(counts, 100, 0.1)}
        assert set(found) == set(names)
        for name, part in found.items():
            hits = [bool(c) for c, g in zip(covered, names, strict=True) if g == name]
            assert (part.n, part.coverage) == (len(hits), pytest.approx(np.mean(hits)))
            assert (part.low, part.high) == coverage_band(100, len(hits), 0.1)


def test_least_covered_first_and_each_with_its_own_rows() -> None:
    covered = np.repeat([True, False, True], [8, 2, 10])
    counts = run(group_counts, [{"covered": covered, "group": np.repeat([7, 3], 10)}])
    got = coverage_by_group(counts, {"7": 50, "3": 8}, 0.1)
    assert [(p.name, p.coverage) for p in got] == [("7", 0.8), ("3", 1.0)]
    assert (got[0].low, got[0].high) == coverage_band(50, 10, 0.1)
    assert (got[1].low, got[1].high) == (1, 1)  # eight rows: that threshold is infinite
    with pytest.raises(DataError, match="group '3'"):
        coverage_by_group(counts, {"7": 50}, 0.1)
    with pytest.raises(DataError, match="group has shape"):
        run(group_counts, [{"covered": covered, "group": np.zeros(3)}])
    assert coverage_by_group(run(group_counts, []), 100, 0.1) == ()
