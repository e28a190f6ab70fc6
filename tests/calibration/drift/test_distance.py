"""Distances of histograms against scipy on the samples behind them, and what chance shows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, entropy, ks_2samp

from calibration.drift.distance import LEVEL, distance
from posthoc.contract import DataError

NULLS = 2000


def histograms(x: np.ndarray, y: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of bins closed on the right, as Prometheus has them."""
    bins = len(edges) + 1
    return tuple(np.bincount(np.searchsorted(edges, v), minlength=bins) for v in (x, y))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(2, 200),
    m=st.integers(2, 200),
    shift=st.floats(0, 1),
    decimals=st.sampled_from([1, 8]),
)
def test_with_a_bin_a_value_ks_is_that_of_the_samples(
    seed: int, n: int, m: int, shift: float, decimals: int
) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=n).round(decimals), (rng.normal(size=m) + shift).round(decimals)
    d = distance(*histograms(x, y, np.unique(np.concatenate([x, y]))))
    raw = ks_2samp(x, y, method="exact")
    assert d.ks == pytest.approx(raw.statistic, abs=1e-12)
    coarse = distance(*histograms(x, y, np.asarray([-1.0, 0.0, 1.0])))
    assert coarse.ks <= d.ks + 1e-12
    assert coarse.ks_pvalue >= d.ks_pvalue


@pytest.mark.parametrize(("n", "m"), [(400, 600), (2000, 2000)])
def test_the_pvalue_of_fine_bins_is_scipys(n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.05, 0.1, 0.15):
        x, y = rng.normal(size=n), rng.normal(size=m) + shift
        d = distance(*histograms(x, y, np.sort(np.concatenate([x, y]))))
        assert d.ks_pvalue == pytest.approx(ks_2samp(x, y, method="exact").pvalue, abs=0.02)


def test_psi_is_the_symmetric_divergence_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 50, 20), rng.integers(0, 50, 20)
    p, q = a + 0.5, b + 0.5
    p, q = p / p.sum(), q / q.sum()
    assert distance(a, b).psi == pytest.approx(entropy(p, q) + entropy(q, p))
    apart = distance(np.asarray([9, 0, 0]), np.asarray([0, 0, 9]))
    assert apart.ks == 1 and 0 < apart.psi < math.inf
    # A bin that is empty in both says nothing.
    again = distance(np.asarray([9, 0]), np.asarray([0, 9]))
    assert (apart.psi, apart.psi_pvalue) == (again.psi, again.psi_pvalue)


def test_the_pvalue_of_psi_is_about_that_of_a_g_test() -> None:
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(10, 5.0))
    for tilt in (0.0, 0.02, 0.05):
        other = share * (1 + tilt * np.arange(-4.5, 5))
        a, b = rng.multinomial(3000, share), rng.multinomial(2000, other / other.sum())
        g = chi2_contingency([a, b], lambda_="log-likelihood", correction=False)
        assert distance(a, b).psi_pvalue == pytest.approx(g.pvalue, rel=0.15, abs=1e-4)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    a=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
)
def test_identities(a: list[float], seed: int) -> None:
    x = np.asarray(a) + (0.0 if sum(a) else 1.0)
    y = np.random.default_rng(seed).integers(0, 40, len(x)) + 1.0
    same = distance(x, x)
    assert (same.ks, same.psi, same.ks_pvalue, same.psi_pvalue) == (0, 0, 1, 1)
    there, back = distance(x, y), distance(y, x)
    assert there.ks == pytest.approx(back.ks, abs=1e-12)
    assert there.psi == pytest.approx(back.psi, abs=1e-12)
    assert distance(x[::-1], y[::-1]).ks == pytest.approx(there.ks, abs=1e-9)
    assert 0 <= there.ks <= 1 and there.psi >= 0
    assert 0 <= there.ks_pvalue <= 1 and 0 <= there.psi_pvalue <= 1
    # More rows of the same shares: as far apart, and less by chance.
    more = distance(100 * x, 100 * y)
    assert more.ks == pytest.approx(there.ks, abs=1e-12)
    assert more.ks_floor <= there.ks_floor and more.psi_floor <= there.psi_floor


@pytest.mark.parametrize("shares", ["even", "steep", "sure"])
@pytest.mark.parametrize(("n", "m"), [(20, 20), (1000, 100), (5000, 5000)])
def test_equal_distributions_are_rarely_found_apart(shares: str, n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    share = {"even": np.ones(20), "steep": np.exp(-0.5 * np.arange(20)), "sure": np.ones(20)}[
        shares
    ]
    if shares == "sure":  # as confidence is: nearly all of it in the last bins
        share[:15] = 0.01
    share = share / share.sum()
    rejected = np.zeros(4)
    for a, b in zip(
        rng.multinomial(n, share, NULLS), rng.multinomial(m, share, NULLS), strict=True
    ):
        d = distance(a, b)
        above = (d.ks > d.ks_floor, d.psi > d.psi_floor)
        # A floor is where its p-value is 1 - LEVEL.
        assert above == (d.ks_pvalue < 1 - LEVEL, d.psi_pvalue < 1 - LEVEL)
        rejected += [*above, d.ks_pvalue <= 0.05, d.psi_pvalue <= 0.05]
    nominal = np.asarray([1 - LEVEL, 1 - LEVEL, 0.05, 0.05])
    assert (rejected / NULLS <= nominal + 3 * np.sqrt(nominal * (1 - nominal) / NULLS)).all()


def test_another_distribution_is_found_apart() -> None:
    rng = np.random.default_rng(0)
    edges = np.linspace(-2, 2, 19)
    moved, wider = [], []
    for _ in range(50):
        moved.append(
            distance(*histograms(rng.normal(size=2000), rng.normal(size=500) + 0.3, edges))
        )
        wider.append(
            distance(*histograms(rng.normal(size=2000), 1.3 * rng.normal(size=500), edges))
        )
    assert sum(d.ks > d.ks_floor for d in moved) >= 45
    assert sum(d.psi > d.psi_floor for d in wider) >= 45
    # KS looks at the largest gap, which a change of spread leaves small.
    assert np.mean([d.ks for d in wider]) < 0.7 * np.mean([d.ks for d in moved])


def test_what_cannot_be_used_is_refused() -> None:
    one = np.ones(3)
    with pytest.raises(DataError, match="of 3 and 2 bins"):
        distance(one, np.ones(2))
    with pytest.raises(DataError, match="the stream histogram has no rows"):
        distance(one, np.zeros(3))
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(DataError, match="the reference histogram holds"):
            distance(np.asarray([1, 1, bad]), one)
