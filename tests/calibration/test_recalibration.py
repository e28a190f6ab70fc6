"""Quantile recalibration: identities, exact coverage of quantiles, a density of mass 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binom, norm
from scipy.stats import t as student

from calibration.bundle import threshold_at
from calibration.recalibration import Base, Recalibration, factors, knots, log_density, recalibrate
from posthoc.contract import FitError

LEVELS = np.asarray([0.05, 0.25, 0.5, 0.75, 0.95])
kinds = pytest.mark.parametrize("kind", ["emp", "linear", "kde"])


def errors(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, size=(n, 1)) * 0.6


@pytest.mark.parametrize("df", [3.0, 8.0, math.inf])
def test_the_base_has_unit_variance_and_is_scipys(df: float) -> None:
    base, p = Base(df), np.linspace(0.01, 0.99, 23)
    theirs = norm() if math.isinf(df) else student(df, scale=math.sqrt((df - 2) / df))
    np.testing.assert_allclose(base.quantile(p), theirs.ppf(p), rtol=1e-10)
    np.testing.assert_allclose(base.cdf(base.quantile(p)), p, atol=1e-12)
    np.testing.assert_allclose(base.log_density(p), theirs.logpdf(p), rtol=1e-10)


def test_exact_transforms_make_linear_the_identity() -> None:
    r = Recalibration("linear", np.arange(1, 100) / 100)
    u = np.linspace(0, 1, 57)
    np.testing.assert_allclose(r.map(u), u, atol=1e-12)
    np.testing.assert_allclose(r.level(u), u, atol=1e-12)


@kinds
def test_levels_turn_the_map_round(kind: str) -> None:
    (r,) = recalibrate(kind, Base(), errors(300, 0))
    a = np.linspace(0.02, 0.98, 40)
    back = r.map(r.level(a))
    assert np.abs(back - a).max() <= (1 / 300 if kind == "emp" else 1e-6)
    assert (np.diff(r.level(a)) >= 0).all() and (np.diff(r.map(a)) >= 0).all()


def test_emp_has_the_rank_of_the_definition() -> None:
    s = errors(99, 1)
    made = factors(Base(), recalibrate("emp", Base(), s), s, LEVELS)
    ordered = np.sort(s[:, 0])
    np.testing.assert_array_equal(made[0], ordered[[4, 24, 49, 74, 94]])


@kinds
def test_a_quantile_is_exceeded_as_often_as_it_says(kind: str) -> None:
    """Over 500 draws of 99 errors; with emp it is exactly k / 100."""
    below = np.zeros(5)
    for seed in range(500):
        s = errors(100, seed)
        made = factors(Base(), recalibrate(kind, Base(), s[:99]), s[:99], LEVELS)[0]
        below += s[99, 0] <= made
    for count, level in zip(below, LEVELS, strict=True):
        slack = 0 if kind == "emp" else 8
        low, high = binom.ppf([0.0005, 0.9995], 500, level)
        assert low - slack <= count <= high + slack


def test_the_smooth_one_has_a_density() -> None:
    (r,) = recalibrate("kde", Base(), errors(60, 3))
    mass, _ = quad(
        lambda u: float(np.exp(r.log_density(np.asarray([u])))[0]), 0, 1, limit=400, epsabs=1e-8
    )
    assert mass == pytest.approx(1, abs=1e-6)
    for u in (0.1, 0.5, 0.93):
        slope = (r.map(np.asarray([u + 1e-6])) - r.map(np.asarray([u - 1e-6])))[0] / 2e-6
        assert math.exp(r.log_density(np.asarray([u]))[0]) == pytest.approx(slope, rel=1e-4)
    assert r.map(np.asarray([0.0, 1.0])).tolist() == [0.0, 1.0]
    with pytest.raises(FitError, match="no density"):
        Recalibration("emp", r.z).log_density(np.asarray([0.5]))


@kinds
def test_ties_and_a_single_row(kind: str) -> None:
    for s in (np.zeros((40, 1)), np.ones((1, 1)), np.repeat(errors(5, 0), 9, axis=0)):
        levels = LEVELS[:3] if len(s) == 1 else LEVELS
        made = factors(Base(), recalibrate(kind, Base(), s), s, levels)
        assert np.isfinite(made).all() and (np.diff(made) >= 0).all()
    with pytest.raises(FitError, match="needs rows"):
        recalibrate(kind, Base(), np.zeros((0, 1)))


def test_a_level_beyond_the_last_error_is_refused() -> None:
    """The n+1-st of n errors is infinite: the largest would be exceeded more often than said."""
    s = errors(18, 0)
    maps = recalibrate("emp", Base(), s)
    for ask in (lambda a: factors(Base(), maps, s, a), maps[0].level):
        with pytest.raises(FitError, match=r"level 0\.95 needs at least 19 conformal rows"):
            ask(np.asarray([0.5, 0.95, 0.99]))
        with pytest.raises(FitError, match="level 1 needs endless"):
            ask(np.asarray([1.0]))
        assert np.isfinite(ask(np.asarray([0.001, 18 / 19]))).all()
    more = errors(19, 0)
    top = factors(Base(), recalibrate("emp", Base(), more), more, np.asarray([0.95]))
    assert top[0, 0] == more.max()
    for kind in ("linear", "kde"):  # as good as they can be, and no promise
        made = factors(Base(), recalibrate(kind, Base(), s), s, np.asarray([0.95]))
        assert np.isfinite(made).all()


@kinds
def test_errors_that_are_no_numbers_are_named(kind: str) -> None:
    s = errors(20, 0)
    s[7] = np.nan
    with pytest.raises(FitError, match="row 7: its error is NaN"):
        recalibrate(kind, Base(), s)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 60), st.floats(0.001, 0.999), st.integers(0, 1000))
def test_emp_is_the_conformal_rank_of_the_transform(n: int, a: float, seed: int) -> None:
    """Quantile recalibration is split conformal with the score F(y | x)."""
    s = errors(n, seed)
    maps = recalibrate("emp", Base(), s)
    threshold = threshold_at(np.sort(Base().cdf(s[:, 0])), 1 - a)
    if math.isinf(threshold):
        with pytest.raises(FitError, match="conformal rows"):
            maps[0].level(np.asarray([a]))
        return
    assert maps[0].level(np.asarray([a]))[0] == threshold
    (made,) = factors(Base(), maps, s, np.asarray([a]))[0]
    assert Base().cdf(made) == threshold


def test_knots_rise_and_are_the_quantiles() -> None:
    s = np.concatenate([errors(2000, 5), errors(2000, 6) * 3], axis=1)
    levels, found = knots(Base(), s)
    assert (np.diff(levels) > 0).all() and (np.diff(found, axis=0) > 0).all()
    middle = (levels > 0.02) & (levels < 0.98)
    want = np.quantile(s, np.clip(levels, 0, 1), axis=0)
    np.testing.assert_allclose(found[middle], want[middle], atol=0.1)
    tied = knots(Base(), np.zeros((50, 1)))[1]
    assert (np.diff(tied, axis=0) > 0).all()


def test_a_recalibrated_density_is_the_slope_of_its_distribution() -> None:
    """Two outputs in units of their own, heavy tails, Student-t beneath."""
    rng = np.random.default_rng(0)
    base, std = Base(5.0), np.asarray([[0.5, 20.0]])
    maps = recalibrate("kde", base, rng.standard_t(3, size=(300, 2)))
    r = rng.normal(size=(200, 2))
    found = log_density(base, np.stack([m.z for m in maps]), r, std)
    h = 1e-4
    for k, one in enumerate(maps):
        ends = [one.map(base.cdf(r[:, k] + s * h)) for s in (-1, 1)]
        slope = (ends[1] - ends[0]) / (2 * h * std[0, k])
        np.testing.assert_allclose(np.exp(found[:, k]), slope, rtol=1e-4)
    # Over the whole line it is one.
    line = np.linspace(-60, 60, 40_001)
    whole = np.exp(log_density(base, maps[0].z[None], line[:, None], np.ones((1, 1))))
    assert np.trapezoid(whole[:, 0], line) == pytest.approx(1, abs=2e-3)
