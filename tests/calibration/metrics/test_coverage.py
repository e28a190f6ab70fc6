"""The coverage band against simulated conformal prediction; set sizes against a slow loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom

from calibration.bundle import conformal_rank, threshold_at
from calibration.metrics.coverage import coverage_band, set_sizes
from posthoc.contract import DataError
from posthoc.folds import run


@pytest.mark.parametrize(("n", "m", "alpha"), [(500, 500, 0.1), (60, 400, 0.05), (1000, 200, 0.2)])
def test_band_holds_simulated_conformal_coverage(n: int, m: int, alpha: float) -> None:
    rng = np.random.default_rng(0)
    low, high = coverage_band(n, m, alpha)
    runs, inside, mean = 4000, 0, 0.0
    for _ in range(runs):
        q = threshold_at(np.sort(rng.exponential(size=n)), alpha)
        coverage = float((rng.exponential(size=m) <= q).mean())
        inside += low <= coverage <= high
        mean += coverage / runs
    assert inside / runs >= 0.99 - 3 * np.sqrt(0.99 * 0.01 / runs)
    assert inside < runs  # and it is not simply everything
    assert mean == pytest.approx(np.ceil((n + 1) * (1 - alpha) - 1e-9) / (n + 1), abs=0.005)


@pytest.mark.parametrize("n", [9, 100, 3000])
@pytest.mark.parametrize("m", [1, 50, 4000])
@pytest.mark.parametrize("alpha", [0.5, 0.1])
def test_band_ends_are_scipys_quantiles(n: int, m: int, alpha: float) -> None:
    k = conformal_rank(n, alpha)
    want = betabinom(m, k, n + 1 - k).ppf([0.005, 0.995]) / m
    np.testing.assert_allclose(coverage_band(n, m, alpha), want, atol=1e-12)


def test_band_counts_the_luck_of_both_samples() -> None:
    def width(n: int, m: int) -> float:
        low, high = coverage_band(n, m, 0.1)
        return high - low

    assert width(500, 500) > 1.3 * width(500, 500_000)
    assert width(500, 500) > 1.3 * width(500_000, 500)


def test_too_few_conformal_rows_cover_everything() -> None:
    assert coverage_band(8, 100, 0.1) == (1, 1)
    assert coverage_band(9, 100, 0.1) != (1, 1)
    with pytest.raises(DataError, match="at least one test row"):
        coverage_band(100, 0, 0.1)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 60), cut=st.integers(0, 60))
def test_set_sizes_equal_the_slow_loop_however_split(seed: int, n: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    sets, y = rng.random((n, 4)) < 0.4, rng.integers(0, 4, n)
    fold = set_sizes(4)
    whole = run(fold, [{"set": sets, "y": y}])
    a = fold.update(fold.init(), {"set": sets[:cut], "y": y[:cut]})
    b = fold.update(fold.init(), {"set": sets[cut:], "y": y[cut:]})
    for totals in (whole, fold.merge(a, b)):
        count, covered = [0] * 5, [0] * 5
        for inside, truth in zip(sets, y, strict=True):
            count[inside.sum()] += 1
            covered[inside.sum()] += bool(inside[truth])
        assert totals.count.tolist() == count
        assert totals.covered.tolist() == covered
        assert totals.coverage_by_size == {
            s: pytest.approx(covered[s] / count[s]) for s in range(5) if count[s]
        }
    if n:
        assert whole.coverage == pytest.approx(
            np.mean([s[t] for s, t in zip(sets, y, strict=True)])
        )
        assert whole.mean_size == pytest.approx(sets.sum(axis=1).mean())
        assert whole.empty_share == pytest.approx((sets.sum(axis=1) == 0).mean())
    else:
        assert np.isnan([whole.coverage, whole.mean_size, whole.empty_share]).all()


def test_sets_over_other_classes_are_refused() -> None:
    with pytest.raises(DataError, match=r"4 classes have shape \(3, 5\)"):
        run(set_sizes(4), [{"set": np.zeros((3, 5)), "y": np.zeros(3, dtype=int)}])
    with pytest.raises(DataError, match="row 1: label 9"):
        run(set_sizes(4), [{"set": np.zeros((2, 4)), "y": np.array([0, 9])}])
