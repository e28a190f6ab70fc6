"""Temperature and strength against a grid search, known temperatures, and their identities."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from calibration.scaling import (
    FLAT,
    fit_classification,
    fit_regression,
    fit_temperature,
    mean_nll,
    student_nll,
)
from posthoc.contract import FitError
from posthoc.links import PROBIT, Spread, probit_scale


def drawn(n: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels drawn from their softmax at a temperature."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 5)) * 4
    return z, (z / temperature + rng.gumbel(size=z.shape)).argmax(1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    z, y = drawn(20_000, temperature)
    assert fit_temperature(z, y)[0] == pytest.approx(temperature, rel=0.05)


def test_a_grid_finds_no_better_temperature() -> None:
    z, y = drawn(500, 2.0)
    t, nll = fit_temperature(z, y)
    grid = np.exp(np.linspace(-3, 3, 2001))
    assert nll <= min(mean_nll(z / g, y) for g in grid) + 1e-9
    assert nll == pytest.approx(mean_nll(z / t, y))


def test_scaled_logits_scale_the_temperature() -> None:
    z, y = drawn(500, 2.0)
    assert fit_temperature(3 * z, y)[0] == pytest.approx(3 * fit_temperature(z, y)[0], rel=1e-9)


def test_without_a_module_it_is_temperature_scaling() -> None:
    z, y = drawn(500, 2.0)
    found = fit_classification(z, y, None)
    assert (found.strength, found.temperature) == (0.0, found.temperature_alone)


def test_a_real_spread_is_found_and_helps() -> None:
    rng = np.random.default_rng(0)
    z, _ = drawn(20_000, 1.0)
    v = rng.gamma(1.0, 4.0, len(z))
    y = (z * probit_scale(v, 1.0, 1.0)[:, None] + rng.gumbel(size=z.shape)).argmax(1)
    found = fit_classification(z, y, Spread(v, amplitude=np.sqrt(v)[:, None]))
    assert found.nll < found.nll_alone - 0.01
    assert PROBIT * found.strength * np.median(v) > 0.5


def test_a_spread_that_says_nothing_costs_next_to_nothing() -> None:
    z, y = drawn(5000, 2.0)
    v = np.random.default_rng(1).gamma(1.0, 4.0, len(z))
    found = fit_classification(z, y, Spread(v, amplitude=np.sqrt(v)[:, None]))
    assert found.nll <= found.nll_alone + FLAT
    fresh_z, fresh_y = drawn(5000, 2.0, seed=2)
    fresh_v = np.random.default_rng(3).gamma(1.0, 4.0, len(z))
    scale = probit_scale(fresh_v, found.temperature, found.strength)
    with_module = mean_nll(fresh_z * scale[:, None], fresh_y)
    assert with_module <= mean_nll(fresh_z / found.temperature_alone, fresh_y) + 0.002


def test_one_scale_mends_a_wrong_noise() -> None:
    rng = np.random.default_rng(0)
    error = rng.normal(size=(5000, 1)) * 3
    found = fit_regression(error, np.ones(1), None)
    assert found.temperature == pytest.approx(3, rel=0.05)


def test_a_heteroscedastic_regression_gets_its_strength() -> None:
    rng = np.random.default_rng(0)
    v = rng.gamma(0.5, 2.0, (5000, 1))
    error = rng.normal(size=v.shape) * np.sqrt(1 + v)
    found = fit_regression(error, np.ones(1), Spread(v, amplitude=np.sqrt(v)))
    assert found.nll < found.nll_alone - 0.02
    assert 0.2 < found.strength < 5


def test_unusable_rows_are_an_error() -> None:
    z, y = drawn(10, 1.0)
    with pytest.raises(FitError, match="no calibration rows"):
        fit_classification(z[:0], y[:0], None)
    with pytest.raises(FitError, match=r"outside 0\.\.4"):
        fit_classification(z, y + 5, None)
    with pytest.raises(FitError, match="not finite"):
        fit_classification(z * np.nan, y, None)
    with pytest.raises(FitError, match="no calibration rows"):
        fit_regression(np.zeros((0, 1)), np.ones(1), None)


def test_a_shift_that_mends_the_head_is_taken_whole() -> None:
    """The frozen head has lost a class's bias; the module's shift gives it back."""
    z, y = drawn(4000, 1.5)
    shift = np.zeros_like(z)
    shift[:, 0] = 2.0
    found = fit_classification(z - shift, y, Spread(np.full(len(z), 1e-6), shift=shift))
    assert found.strength * found.temperature**2 == pytest.approx(1.0)
    assert found.temperature == pytest.approx(1.5, rel=0.1)
    assert found.nll == pytest.approx(fit_classification(z, y, None).nll, abs=1e-4)


def test_a_shift_that_spoils_the_head_is_left() -> None:
    z, y = drawn(4000, 1.0)
    shift = 2 * np.random.default_rng(1).normal(size=z.shape)
    found = fit_classification(z, y, Spread(np.full(len(z), 1e-6), shift=shift))
    assert found.strength * found.temperature**2 < 0.1**2
    assert found.nll <= found.nll_alone + FLAT


def test_members_are_weighed_by_the_likelihood() -> None:
    """Labels are drawn from a mixture of two heads, of which the frozen one is neither."""
    rng = np.random.default_rng(0)
    z = 2 * rng.normal(size=(6000, 4))
    draws = np.stack([3 * rng.normal(size=z.shape), 3 * rng.normal(size=z.shape)], 1)
    chosen = rng.integers(2, size=len(z))
    truth = z + draws[np.arange(len(z)), chosen]
    y = (truth + rng.gumbel(size=z.shape)).argmax(1)
    found = fit_classification(z, y, Spread(None, draws=draws))
    assert found.nll < found.nll_alone - 0.1
    assert found.temperature == pytest.approx(1.0, rel=0.1)
    assert found.strength * found.temperature**2 == pytest.approx(1.0, rel=0.05)


def test_a_regression_that_moves() -> None:
    rng = np.random.default_rng(0)
    shift = rng.normal(size=(5000, 2))
    error = shift + 0.3 * rng.normal(size=shift.shape)
    found = fit_regression(error, np.ones(2), Spread(np.full_like(shift, 1e-9), shift=shift))
    assert found.strength == 1.0
    assert found.temperature == pytest.approx(0.3, rel=0.05)


def test_student_density_by_scipy() -> None:
    error, variance = np.linspace(-4, 4, 9), np.linspace(0.5, 2.5, 9)
    scale = np.sqrt(variance * 3 / 5)
    np.testing.assert_allclose(
        student_nll(error, variance, 5.0), -stats.t.logpdf(error, 5, scale=scale), rtol=1e-12
    )
    np.testing.assert_allclose(
        student_nll(error, variance, np.inf), -stats.norm.logpdf(error, scale=np.sqrt(variance))
    )


def test_student_tails_get_their_own_scale() -> None:
    rng = np.random.default_rng(0)
    error = stats.t.rvs(4, size=(20_000, 1), random_state=rng)
    found = fit_regression(error, np.ones(1), None, df=4.0)
    assert found.temperature == pytest.approx(np.sqrt(2), rel=0.05)  # the variance of t with 4 df
