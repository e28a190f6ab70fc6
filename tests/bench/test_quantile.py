"""The bench of quantiles: its figures against definitions, its ratio on rows that chance alone
moves, and one real split."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad

from bench import quantile
from bench.suite import load
from calibration.metrics.proper import gaussian_crps, gaussian_log_loss
from calibration.metrics.regression import PCE_LEVELS, pce_floor, pit_totals
from calibration.recalibration import Base, recalibrate


def errors(n: int, seed: int, df: float = 4.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(df, size=(n, 1))


def test_before_recalibration_the_figures_are_the_gaussians() -> None:
    base, r = Base(), errors(4000, 0)
    std = np.random.default_rng(1).uniform(0.5, 2, r.shape)
    row = quantile.figures("none", base, r[:0], r, std)
    totals = pit_totals.update(pit_totals.init(), base.cdf(r))
    assert row["pce"] == pytest.approx(totals.pce, abs=1e-12)
    assert row["nll"] == pytest.approx(gaussian_log_loss(r * std, std).mean())
    assert row["crps"] == pytest.approx(gaussian_crps(r * std, std).mean(), rel=0.02)
    assert row["width"] == pytest.approx(2 * 1.650 * std.mean(), rel=0.01)


@pytest.mark.parametrize("kind", quantile.KINDS)
def test_after_recalibration_they_are_their_definitions(kind: Any) -> None:
    base, conformal, r = Base(), errors(300, 0), errors(200, 1)
    std = np.full(r.shape, 2.0)
    row = quantile.figures(kind, base, conformal, r, std)
    (found,) = recalibrate(kind, base, conformal)
    q = base.quantile(found.level(PCE_LEVELS))
    pce = np.mean([abs(np.mean([e <= q[j] for e in r]) - a) for j, a in enumerate(PCE_LEVELS)])
    assert row["pce"] == pytest.approx(pce, abs=1e-9)
    losses = [
        2 * 2.0 * (a * max(e - q[j], 0) + (1 - a) * max(q[j] - e, 0))
        for e in r[:, 0]
        for j, a in enumerate(PCE_LEVELS)
    ]
    assert row["crps"] == pytest.approx(np.mean(losses))
    assert row["width"] == pytest.approx(2.0 * (q[95] - q[4]))
    assert ("nll" in row) == (kind == "kde")


def test_the_density_of_kde_is_a_density_and_its_likelihood_is_served_here() -> None:
    base, conformal, r = Base(), errors(300, 0), errors(50, 1)
    std = np.full(r.shape, 0.5)
    (found,) = recalibrate("kde", base, conformal)

    def density(e: float) -> float:  # of the target's error e
        u = base.cdf(np.asarray([e / 0.5]))
        return (
            float(np.exp(found.log_density(u) + base.log_density(np.asarray([e / 0.5])))[0]) / 0.5
        )

    mass, _ = quad(density, -8, 8, limit=500, points=[-1, 0, 1])
    assert mass == pytest.approx(1, abs=1e-4)
    want = -np.mean([math.log(density(0.5 * e)) for e in r[:, 0]])
    row = quantile.figures("kde", base, conformal, r, std)
    assert row["nll"] == pytest.approx(want, abs=1e-3)
    exact = found.log_density(base.cdf(r[:, 0]))
    np.testing.assert_allclose(quantile.interpolated(found, base.cdf(r[:, 0])), exact, atol=2e-3)


@pytest.mark.parametrize("kind", quantile.KINDS)
def test_the_floor_is_what_chance_leaves(kind: Any) -> None:
    """Whatever the errors' distribution, PCE over its floor is about 1 over many samples; of kde
    where its kernel, a hundredth of the levels wide, blurs no edge."""
    ratios = []
    for seed in range(12 if kind == "kde" else 30):
        r = errors(1000, seed, df=3) * (0.6 if kind == "kde" else 1.7)
        row = quantile.figures(kind, Base(), r[:500], r[500:], np.ones((500, 1)))
        ratios.append(row["pce"] / pce_floor(500, 500))
    assert np.mean(ratios) == pytest.approx(1, abs=0.25)
    assert max(ratios) < quantile.LIMIT_ONE


def test_means_over_splits_and_the_largest_of_them() -> None:
    rows = [
        {"set": "a", "kind": "emp", "pce": p, "floor": 0.1, "crps": 1.0, "width": 2.0}
        for p in (0.1, 0.3)
    ]
    (row,) = quantile._table(rows)
    assert row["over_floor"] == pytest.approx(2) and row["over_floor_max"] == pytest.approx(3)
    assert row["pce"] == pytest.approx(0.2) and "nll" not in row


def test_a_real_split_of_a_small_set() -> None:
    rows = {r["kind"]: r for r in quantile.one(load("concrete", grouped=False).material, 0)}
    assert set(rows) == {"none", "emp", "linear", "kde"}
    for kind, r in rows.items():
        assert all(math.isfinite(v) for k, v in r.items() if k != "kind")
        assert r["pce"] < quantile.LIMIT_ONE * r["floor"] or kind == "none"
