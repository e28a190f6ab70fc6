"""DSM-BOCD against its definition: the loss, minimised numerically; integrals and draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import gamma, norm, truncnorm

from calibration.drift import dsm
from posthoc.contract import DataError

modest = settings(deadline=None, derandomize=True, max_examples=25)
WINDOWS = {
    "standard": norm.rvs(size=30, random_state=0),
    "moved": norm.rvs(2, 0.5, size=12, random_state=1),
    "wide": norm.rvs(-1, 2, size=8, random_state=2),
    "outliers": np.array([0.1, -0.4, 10.0, 0.3, -10.0, 0.2]),
    "one": np.array([1.7]),
}
windows = pytest.mark.parametrize("z", WINDOWS.values(), ids=WINDOWS)


def statistics(z: np.ndarray, omega: float) -> np.ndarray:
    """S of one dimension, observation by observation."""
    stats, model = dsm.PRIOR[None, None], dsm.Model((omega,))
    for i, x in enumerate(z):
        stats = model.updated(stats, np.array([i]), np.array([x]))
    return np.asarray(stats[0, 0])


def objective(eta: np.ndarray, z: np.ndarray, omega: float) -> float:
    """Minus the log of the generalised posterior: ω times the diffusion score-matching loss
    ``Σ m² s² + 2 (m² s)'`` with score s(x) = η₁ - η₂ x, the derivative by complex step; and the
    prior N((0, 1), I)."""
    total = 0.5 * (eta[0] ** 2 + (eta[1] - 1) ** 2)
    for x in z:

        def weighted(at: complex) -> complex:
            return (eta[0] - eta[1] * at) / (1 + at * at)

        score, slope = eta[0] - eta[1] * x, weighted(x + 1e-30j).imag / 1e-30
        total += omega * (score**2 / (1 + x * x) + 2 * slope)
    return float(total)


@windows
@pytest.mark.parametrize("omega", [0.1, 0.65, 3.0])
def test_the_posterior_minimises_the_loss_and_its_covariance_is_the_curvature(
    z: np.ndarray, omega: float
) -> None:
    mean, covariance = dsm.posterior(statistics(z, omega))
    found = minimize(objective, [0.0, 1.0], (z, omega), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(mean, found.x, atol=1e-5)
    step = 0.25  # the objective is quadratic: differences are exact
    at = [
        [objective(mean + step * np.array(d), z, omega) for d in row]
        for row in (((1, 0), (-1, 0)), ((0, 1), (0, -1)), ((1, 1), (-1, -1)))
    ]
    here = objective(mean, z, omega)
    second = [(up + down - 2 * here) / step**2 for up, down in at]
    cross = (second[2] - second[0] - second[1]) / 2
    curvature = np.array([[second[0], cross], [cross, second[1]]])
    np.testing.assert_allclose(covariance, np.linalg.inv(curvature), rtol=1e-6, atol=1e-9)


def test_with_known_variance_half_and_weight_one_it_is_gaussian_conjugacy() -> None:
    """At 0 the weight is 1; given η₂ = 1, η₁ is then the mean of N(mean, 1) with prior N(0, 1)."""
    for n in (0, 1, 7):
        a, b, _, l1, _ = statistics(np.zeros(n), 0.5)
        assert a == 1 + n and (l1 - b) / a == 0
    # Elsewhere each observation counts by its weight 1/(1 + x²).
    z = WINDOWS["standard"]
    assert statistics(z, 0.5)[0] == pytest.approx(1 + sum(1 / (1 + x * x) for x in z))


def test_one_observation_moves_the_posterior_boundedly() -> None:
    z = WINDOWS["standard"]
    mean, covariance = dsm.posterior(statistics(z, 0.65))
    for x in (3.0, 10.0, 1e3, 1e6):
        moved, _ = dsm.posterior(statistics(np.append(z, x), 0.65))
        assert np.abs(moved - mean).max() < 2 * math.sqrt(covariance.max())
    far = [dsm.posterior(statistics(np.append(z, x), 0.65))[0] for x in (1e3, 1e6)]
    np.testing.assert_allclose(*far, atol=1e-2)


def density(z: np.ndarray, omega: float, x: float) -> float:
    stats = statistics(z, omega)[None, None]
    return math.exp(dsm.Model((omega,)).log_density(stats, np.array([len(z)]), np.array([x]))[0, 0])


def integral(z: np.ndarray, omega: float, x: float) -> float:
    """The predictive density over η₂ > 0, given which η₁ is normal, by adaptive quadrature."""
    mean, c = dsm.posterior(statistics(z, omega))
    sd = math.sqrt(c[1, 1])

    def given(eta: float) -> float:
        m1 = mean[0] + c[0, 1] / c[1, 1] * (eta - mean[1])
        v1 = c[0, 0] - c[0, 1] ** 2 / c[1, 1]
        like = norm.pdf(x, m1 / eta, math.sqrt(1 / eta + v1 / eta**2))
        return float(like * norm.pdf(eta, mean[1], sd) / norm.sf(0, mean[1], sd))

    high = max(mean[1] + 9 * sd, 2 * sd)
    return float(quad(given, max(0.0, mean[1] - 9 * sd), high, limit=400)[0])


@windows
@pytest.mark.parametrize("x", [-3.0, 0.0, 0.8, 2.5, 5.0])
def test_the_predictive_is_the_integral_over_the_posterior(z: np.ndarray, x: float) -> None:
    """To 2 % above a thousandth; below, in units of what the contamination adds (0.0018 at 5)."""
    exact = integral(z, 0.65, x)
    assert density(z, 0.65, x) == pytest.approx(exact, rel=0.02, abs=2e-5)


def test_and_the_mean_over_draws_of_it() -> None:
    rng, z = np.random.default_rng(0), WINDOWS["moved"]
    mean, c = dsm.posterior(statistics(z, 0.65))
    sd = math.sqrt(c[1, 1])
    e2 = truncnorm.rvs(-mean[1] / sd, np.inf, mean[1], sd, size=400_000, random_state=rng)
    e1 = mean[0] + c[0, 1] / c[1, 1] * (e2 - mean[1])
    e1 += rng.normal(0, math.sqrt(c[0, 0] - c[0, 1] ** 2 / c[1, 1]), len(e2))
    for x in (0.0, 1.5, 2.5):
        drawn = norm.pdf(x, e1 / e2, 1 / np.sqrt(e2))
        error = drawn.std() / math.sqrt(len(drawn))
        assert density(z, 0.65, x) == pytest.approx(drawn.mean(), abs=4 * error + 1e-3)


@given(st.lists(st.floats(-5, 5), max_size=25), st.floats(0.01, 5))
@modest
def test_the_predictive_is_a_density(z: list[float], omega: float) -> None:
    """Its tails are Cauchy-like: between ±L lies all but a multiple of 1/L."""
    stats = statistics(np.array(z), omega)[None, None]
    u = np.linspace(-1, 1, 40_001)[1:-1] * math.pi / 2
    x = np.tan(u)  # ∫ f dx = ∫ f(tan u) / cos² u du
    model, length = dsm.Model((omega,)), np.array([len(z)])
    f = np.exp([model.log_density(stats, length, np.array([a]))[0, 0] for a in x[::40]])
    total = np.trapezoid(f / np.cos(u[::40]) ** 2, u[::40])
    peak = f.max()
    assert total == pytest.approx(1, abs=0.02 + 0.002 * peak)


def divergence(z: np.ndarray, omega: float) -> tuple[float, float]:
    """KL(DSM ‖ normal-gamma) by draws, in (mean, λ) with the change of variables, up to what does
    not depend on omega; and its standard error."""
    mean, c = dsm.posterior(statistics(z, omega))
    root = np.linalg.cholesky(c)
    eta = mean + np.random.default_rng(0).normal(size=(200_000, 2)) @ root.T
    eta = eta[eta[:, 1] > 0]
    away = np.linalg.solve(root, (eta - mean).T)
    log_q = -0.5 * (away**2).sum(0) - math.log(2 * math.pi) - np.log(np.diag(root)).sum()
    n, u = len(z), z.sum() / (1 + len(z))
    rate = 1 + 0.5 * ((z - z.mean()) ** 2).sum() + n * z.mean() ** 2 / (2 * (1 + n))
    e1, e2 = eta.T
    log_p = norm.logpdf(e1 / e2, u, 1 / np.sqrt((1 + n) * e2)) - np.log(e2)
    log_p += gamma.logpdf(e2, 1 + n / 2, scale=1 / rate)
    return float((log_q - log_p).mean()), float((log_q - log_p).std() / math.sqrt(len(e1)))


@pytest.mark.parametrize(("seed", "spread"), [(0, 1.0), (1, 1.0), (2, 0.7), (3, 1.4)])
def test_omega_is_where_the_divergence_is_least(seed: int, spread: float) -> None:
    z = norm.rvs(0, spread, size=200, random_state=seed)
    omega = dsm.fit_omega(z)
    assert 0.2 < omega < 3
    least, error = divergence(z, omega)
    for factor in (0.5, 0.8, 1.25, 2.0):  # the draws are common
        assert divergence(z, omega * factor)[0] > least - 0.2 * error
    assert divergence(z, omega * 0.5)[0] > least + 3 * error
    assert divergence(z, omega * 2.0)[0] > least + 3 * error


def test_omega_is_fitted_dimension_by_dimension_or_as_given() -> None:
    reference = norm.rvs(size=(200, 2), random_state=4) * [1, 50]
    state = dsm.start(reference)
    scaled = (reference - state.scale.centre) / state.scale.spread
    fitted = [dsm.fit_omega(np.clip(c, -5, 5)) for c in scaled.T]
    assert state.model.omega == pytest.approx(fitted, rel=1e-6)
    state = dsm.start(reference, omega=0.3)
    assert state.model.omega == (0.3, 0.3)
    moved = reference[:150] + np.array([9, 450])
    for x in np.concatenate((reference[:20], moved)):
        state, _ = dsm.step(state, x)
    assert state.scale.centre[0] > 8 and state.model.omega == (0.3, 0.3)  # of a new regime too
    with pytest.raises(DataError, match="omega is 2000"):
        dsm.start(reference, omega=2000.0)


def test_dimensions_are_independent() -> None:
    z = norm.rvs(size=(6, 2), random_state=5)
    model, stats = dsm.Model((0.4, 0.9)), np.tile(dsm.PRIOR, (1, 2, 1))
    for i, row in enumerate(z):
        stats = model.updated(stats, np.array([i]), row)
    for d, omega in enumerate(model.omega):
        np.testing.assert_allclose(stats[0, d], statistics(z[:, d], omega))
        both = model.log_density(stats, np.array([6]), np.array([0.3, -1.2]))[0, d]
        assert math.exp(both) == pytest.approx(density(z[:, d], omega, (0.3, -1.2)[d]))


def test_it_sees_a_change_of_spread_too() -> None:
    state = dsm.start(norm.rvs(size=200, random_state=0))
    found = []
    for x in np.r_[norm.rvs(size=100, random_state=1), norm.rvs(0, 3.5, size=80, random_state=2)]:
        state, one = dsm.step(state, x)
        found.append(one.alarm)
    assert 100 <= found.index(True) < 180 and not any(found[:100])
