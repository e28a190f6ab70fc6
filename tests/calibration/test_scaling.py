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
from posthoc.links import PROBIT, Spread, probit_scale, softmax


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
    # The fit smooths the labels by a tenth of a row.
    assert nll <= min(mean_nll(z / g, y) for g in grid) + 1e-6
    assert nll == pytest.approx(mean_nll(z / t, y))


@pytest.mark.parametrize("n", [5, 50, 2000])
@pytest.mark.parametrize("classes", [2, 1000])
def test_rows_without_an_error_are_no_certainty(n: int, classes: int) -> None:
    """All predicted right by any margin: T = 0 has the least NLL and would serve probability 1."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(n, classes))
    y = z.argmax(1)
    t, _ = fit_temperature(z, y)
    p = softmax(z / t)[np.arange(n), y]
    assert np.median(p) > 0.5 and p.mean() < 1 - 0.01 / n


def test_a_model_worse_than_chance_gets_the_uniform_distribution() -> None:
    z, y = drawn(500, 1.0)
    p = softmax(-z / fit_temperature(-z, y)[0])
    np.testing.assert_allclose(p, 1 / z.shape[1], atol=0.01)


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


@pytest.mark.parametrize("predictive", ["probit", "mc"])
def test_more_than_the_posterior_says_is_not_made_of_a_flat_likelihood(predictive: str) -> None:
    """A variance that no row shows in the likelihood: the epistemic share stays the module's."""
    z, y = drawn(2000, 2.0)
    v = np.full(len(z), 0.01)
    spread = Spread(v, amplitude=np.sqrt(v)[:, None] / 2, directions=np.eye(5)[:1])
    eps = np.random.default_rng(0).normal(size=(16, 1))
    found = fit_classification(z, y, spread, predictive, eps)
    assert 0.1 < found.strength * found.temperature**2 <= 1 + 1e-9
    error = np.random.default_rng(1).normal(size=(2000, 1))
    found = fit_regression(error, np.ones(1), Spread(v[:, None], amplitude=np.sqrt(v)[:, None]))
    assert found.strength == 1.0


def test_the_unit_of_an_output_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    v = rng.gamma(0.5, 2.0, (3000, 2))
    error = rng.normal(size=v.shape) * np.sqrt(1 + v)
    one = fit_regression(error, np.ones(2), Spread(v, amplitude=np.sqrt(v)))
    unit = np.asarray([1.0, 1e4])
    other = fit_regression(error * unit, unit**2, Spread(v * unit**2, amplitude=np.sqrt(v) * unit))
    assert other.strength == pytest.approx(one.strength)
    assert other.temperature == pytest.approx(one.temperature)


def test_rows_in_the_order_of_their_classes() -> None:
    """The search under other links reads some of the rows: not the first ones, which here are of
    the classes that the model knows best."""
    rng = np.random.default_rng(0)
    c, n = 100, 3000
    z = rng.normal(size=(n, c))
    z[np.arange(n), rng.integers(c, size=n)] += 8
    order = np.argsort(z.argmax(1), kind="stable")
    z = z[order]
    y = z.argmax(1)
    wrong = (y >= c // 2) & (rng.random(n) < 0.6)
    y[wrong] = rng.integers(c, size=int(wrong.sum()))
    draws = 1e-3 * rng.normal(size=(n, 64, c))
    found = fit_classification(z, y, Spread(np.full(n, 1e-6), draws=draws), "mc")
    assert found.temperature == pytest.approx(found.temperature_alone, rel=0.05)


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


def test_a_chance_of_few_rows_is_no_reason_to_outdo_the_posterior() -> None:
    """Small samples of homoscedastic errors: a tenfold strength that luck prefers is not taken."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        v = 0.01 * rng.gamma(2.0, 0.5, (150, 1))
        found = fit_regression(rng.normal(size=v.shape), np.ones(1), Spread(v, np.sqrt(v)))
        assert found.strength <= 1.0 + 1e-9


def test_a_loss_that_says_nothing_is_not_all_that_is_served() -> None:
    """A predicted variance that is the same for all rows leaves the constant part in charge."""
    error = np.random.default_rng(0).normal(size=(2000, 1))
    assert fit_regression(error, np.ones(1), Spread(np.ones_like(error))).strength == 0.0
    z, y = drawn(2000, 2.0)
    assert fit_classification(z, y, Spread(np.ones(len(z)))).strength == 0.0


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_a_student_noise_may_be_wrong_by_orders_of_magnitude(factor: float) -> None:
    error = factor * stats.t.rvs(5, size=(4000, 1), random_state=np.random.default_rng(0))
    found = fit_regression(error, np.ones(1), None, df=5.0)
    assert found.temperature == pytest.approx(factor * np.sqrt(5 / 3), rel=0.05)


def test_targets_without_an_error_are_an_error() -> None:
    with pytest.raises(FitError, match="without error"):
        fit_regression(np.zeros((50, 1)), np.ones(1), None)
    with pytest.raises(FitError, match="without error"):
        fit_regression(np.ones((50, 1)), np.zeros(1), None)
    with pytest.raises(FitError, match="not finite"):
        fit_regression(np.full((50, 1), np.nan), np.ones(1), None)


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
