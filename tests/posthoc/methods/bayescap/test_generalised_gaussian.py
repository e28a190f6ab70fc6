"""The generalised Gaussian against scipy's, its identities, and fits of known noise."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import gennorm, laplace, norm

from posthoc.contract import FitError
from posthoc.methods.bayescap import generalised_gaussian as gg

sane = settings(deadline=None, derandomize=True, max_examples=60)


def test_the_worked_example() -> None:
    assert gg.variance(1.3, 0.8) == pytest.approx(8.24672328562085, rel=1e-13)
    assert gg.nll(0.7, 1.3, 0.8) == pytest.approx(1.68981304910576, rel=1e-13)


@given(st.floats(-8, 8), st.floats(0.05, 20), st.floats(0.3, 8))
@sane
def test_it_is_scipys(r: float, alpha: float, beta: float) -> None:
    peer = gennorm(beta, scale=alpha)
    if 1e-9 <= (abs(r) / alpha) ** beta <= 1e3:
        assert gg.nll(r, alpha, beta) == pytest.approx(-peer.logpdf(r), rel=1e-10, abs=1e-9)
        assert gg.density(r, alpha, beta) == pytest.approx(peer.pdf(r), rel=1e-9, abs=1e-300)
    assert gg.cdf(r, alpha, beta) == pytest.approx(peer.cdf(r), abs=1e-12)
    assert gg.variance(alpha, beta) == pytest.approx(peer.var(), rel=1e-10)


@given(st.floats(1e-6, 1 - 1e-6), st.floats(0.05, 20), st.floats(0.3, 8))
@sane
def test_quantiles_turn_the_cdf_round(p: float, alpha: float, beta: float) -> None:
    r = float(gg.quantile(p, alpha, beta))
    assert gg.cdf(r, alpha, beta) == pytest.approx(p, abs=1e-9)
    assert r == pytest.approx(gennorm(beta, scale=alpha).ppf(p), rel=1e-5, abs=1e-7)
    assert gg.quantile(1 - p, alpha, beta) == pytest.approx(-r, rel=1e-6, abs=1e-9)


def test_the_normal_and_the_laplace_are_among_them() -> None:
    r = np.linspace(-4, 4, 33)
    np.testing.assert_allclose(gg.nll(r, np.sqrt(2) * 1.7, 2.0), -norm(scale=1.7).logpdf(r))
    np.testing.assert_allclose(gg.nll(r, 1.7, 1.0), -laplace(scale=1.7).logpdf(r), rtol=1e-8)


@pytest.mark.parametrize("highest", [np.log(10.0), gg.HIGHEST])
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.5])
def test_the_tangent_leaves_a_density(beta: float, highest: float) -> None:
    def density(r: float) -> float:
        return float(np.exp(-gg.log_nll(np.log(r), np.log(0.8), np.log(beta), highest)))

    mass = 2 * (quad(density, 1e-12, 1)[0] + quad(density, 1, 50)[0] + quad(density, 50, 5e4)[0])
    assert mass == pytest.approx(1.0, abs=2e-4)


def test_no_error_overflows_and_a_larger_one_costs_more() -> None:
    sizes = 10.0 ** np.arange(-300, 301, 20)
    cost = gg.nll(sizes, 1e-3, 3.0)
    assert np.isfinite(cost).all() and (np.diff(cost) >= 0).all()
    assert (np.diff(cost[sizes > 1]) > 1).all()
    assert np.isfinite(gg.nll(0.0, 1.0, 0.3))


@given(st.floats(-25, 25), st.sampled_from([2.3, 7.0]))
@sane
def test_the_slope_is_the_derivative(e: float, highest: float) -> None:
    if abs(e - gg.LOWEST) < 1e-3:
        return
    up, down = gg.energy(e + 1e-6, highest), gg.energy(e - 1e-6, highest)
    assert gg.slope(e, highest) == pytest.approx(float(up - down) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(("noise", "beta", "variance"), [("normal", 2, 1), ("laplace", 1, 2)])
def test_a_fit_recovers_the_noise(noise: str, beta: float, variance: float) -> None:
    found = []
    for seed in range(5):
        draws = getattr(np.random.default_rng(seed), noise)(size=(20_000, 1)) * 0.03
        (a,), (b,) = gg.fit(draws)
        found.append((abs(b / beta - 1), abs(gg.variance(a, b) / 0.03**2 / variance - 1)))
    assert median(b for b, _ in found) < 0.05
    assert median(v for _, v in found) < 0.05


def test_a_fit_has_the_largest_likelihood() -> None:
    errors = np.random.default_rng(0).standard_t(4, size=(3000, 2)) * [1.0, 50.0]
    alpha, beta = gg.fit(errors)
    for k in range(2):

        def cost(x: np.ndarray, k: int = k) -> float:
            return float(gg.nll(errors[:, k], *np.exp(x)).mean())

        best = minimize(cost, np.log([alpha[k], beta[k]]), method="Nelder-Mead")
        assert cost(np.log([alpha[k], beta[k]])) == pytest.approx(best.fun, abs=1e-7)
    assert (gg.fit(errors, (1.5, 3.0))[1] >= 1.5).all()


def test_the_scale_has_the_largest_likelihood() -> None:
    rng = np.random.default_rng(0)
    log_alpha, log_beta = rng.normal(size=400), rng.uniform(-0.7, 0.9, 400)
    log_r = np.log(np.abs(gennorm(np.exp(log_beta)).rvs(random_state=rng))) + log_alpha + 0.4
    c = gg.log_scale(log_r, log_alpha, log_beta)
    assert c == pytest.approx(0.4, abs=0.15)
    costs = [gg.log_nll(log_r, log_alpha + c + d, log_beta).mean() for d in (-1e-3, 0, 1e-3)]
    assert costs[1] < min(costs[0], costs[2])
    beta = np.full(400, np.log(1.3))  # closed where all rows have one beta
    closed = np.log(1.3 * np.mean(np.exp(1.3 * (log_r - log_alpha)))) / 1.3
    assert gg.log_scale(log_r, log_alpha, beta) == pytest.approx(closed, abs=1e-9)


def test_no_errors_are_named() -> None:
    with pytest.raises(FitError, match="has none"):
        gg.fit(np.zeros((0, 1)))
    with pytest.raises(FitError, match="without error"):
        gg.fit(np.stack([np.ones(5), np.zeros(5)], 1))
