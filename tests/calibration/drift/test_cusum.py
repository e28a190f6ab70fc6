"""CUSUM against its definition as a maximum over starting points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.drift import cusum
from calibration.drift.detector import run

modest = settings(deadline=None, derandomize=True, max_examples=60)
REFERENCE = np.random.default_rng(0).normal(3, 2, size=(200, 2))


@given(st.lists(st.tuples(st.floats(-9, 15), st.floats(-9, 15)), min_size=1, max_size=60))
@modest
def test_each_sum_is_the_largest_over_where_it_may_start(rows: list[tuple[float, float]]) -> None:
    state = cusum.start(REFERENCE, slack=0.75, limit=4.0, clip=2.5)
    median = np.median(REFERENCE, axis=0)
    spread = np.median(np.abs(REFERENCE - median), axis=0) * 1.482602218505602
    z = np.clip((np.array(rows) - median) / spread, -2.5, 2.5)
    for t in range(1, len(z) + 1):
        state, found = cusum.step(state, rows[t - 1])
        # Up and down of each dimension: the sum of what exceeds the slack, from any start on.
        sums = {
            (sign, d): [float((sign * z[s:t, d] - 0.75).sum()) for s in range(t)] + [0.0]
            for sign in (1, -1)
            for d in (0, 1)
        }
        np.testing.assert_allclose(state.up, [max(sums[1, d]) for d in (0, 1)], atol=1e-9)
        np.testing.assert_allclose(state.down, [max(sums[-1, d]) for d in (0, 1)], atol=1e-9)
        highest = max(max(s) for s in sums.values())
        assert found.evidence == pytest.approx(min(1, highest / 4))
        if abs(highest - 4) > 1e-9:
            assert found.alarm == (highest > 4)
        if found.alarm:
            assert found.change is not None
            best = max(sums, key=lambda key: max(sums[key]))
            assert sums[best][found.change] == pytest.approx(highest)
            return


def test_six_outliers_in_a_row_are_needed() -> None:
    """Each adds clip - slack = 1 to a sum whose limit is 5."""
    state, found = run(cusum, cusum.start(REFERENCE[:, 0]), [1e9] * 5)  # type: ignore[arg-type]
    assert not any(f.alarm for f in found) and state.up == (5.0,)
    assert cusum.step(state, 1e9)[1].alarm


def test_windows_show_a_shift_below_the_slack() -> None:
    plain, means = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        reference, xs = rng.normal(size=3200), rng.normal(0.5, 1, size=480)
        _, found = run(cusum, cusum.start(reference), xs)  # type: ignore[arg-type]
        plain.append(any(f.alarm for f in found))
        state = cusum.start(reference.reshape(-1, 16).mean(axis=1))
        _, found = run(cusum, state, xs.reshape(-1, 16).mean(axis=1))  # type: ignore[arg-type]
        means.append(any(f.alarm for f in found))
    assert sum(plain) <= 10 and sum(means) >= 18, (plain, means)
