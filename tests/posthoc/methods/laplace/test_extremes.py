"""Features far from zero or in odd units, rows that say little, models that are sure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq

from posthoc import links, registry
from posthoc.contract import Features, FitError, LinearHead
from posthoc.methods.laplace import noise, sums
from posthoc.methods.laplace.prior import Spectrum, by_epsilon, by_evidence, by_held_out
from posthoc.rows import of
from tests.posthoc.methods.laplace.material import PAGES, fitted, material, summed

NAMES = {"kron": "laplace", "diag": "laplace_diag", "full": "laplace_full", "identity": "icla"}
structures = pytest.mark.parametrize("structure", PAGES)


@pytest.mark.parametrize(
    ("values", "norm"),
    [
        ([1e-6], 1.0),  # the fixed point's own iteration swings between 1e-6 and 0.5
        ([1e-6] * 5 + [1e-9], 1.0),
        ([1e20] * 5, 1e-14),  # features in the millions
        (list(np.logspace(-12, 8, 2000)), 3.0),
    ],
)
def test_the_evidence_has_its_maximum_where_a_bracketing_search_finds_it(
    values: list[float], norm: float
) -> None:
    h = np.asarray(values)
    found, steps = by_evidence(Spectrum(h, norm))

    def short(u: float) -> float:
        return float(np.log((h / (h + np.exp(u))).sum() / norm) - u)

    assert found == pytest.approx(np.exp(brentq(short, -60, 60, xtol=1e-13)), rel=1e-9)
    assert steps < 10


def test_the_noise_and_the_precision_are_at_their_fixed_point_where_rows_say_little() -> None:
    mu, squared, n, norm = np.asarray([1e-3] * 4 + [50.0]), np.asarray([10.0, 1e7]), 10, 2.0
    errors = sums.Errors(squared, n)
    d, found, _ = noise.fit_noise(errors, mu, norm, None, False)
    h = np.divide.outer(mu, found)
    gamma = (h / (h + d)).sum(0)
    assert d == pytest.approx(gamma.sum() / norm, rel=1e-8)
    np.testing.assert_allclose(found, squared / (n - gamma), rtol=1e-8)
    kept, same, _ = noise.fit_noise(errors, mu, norm, 3.0, True)
    assert kept == 3.0
    np.testing.assert_allclose(same, squared / n)


def test_a_model_that_is_certain_of_every_row_has_no_evidence() -> None:
    head, rows = material()
    sure = Features(rows.phi, 200.0 * np.eye(4)[rows.y], rows.y)
    for name in ("laplace", "laplace_diag", "laplace_full"):
        with pytest.raises(FitError, match="certain of every row"):
            registry.fit(name, head, "classification", of(sure), {})
        state = registry.fit(name, head, "classification", of(sure), {"prior_precision": 2.0})
        variance = registry.page(name).spread(state, rows.phi, rows.z).variance
        np.testing.assert_allclose(variance, (1.0 + (rows.phi**2).sum(1)) * 2 / 2.0, rtol=1e-9)


@structures
@pytest.mark.parametrize("scale", [1e-3, 1e7])
@pytest.mark.parametrize("prior", ["epsilon", "heldout"])
def test_the_rules_hold_in_any_unit_of_the_features(
    structure: str, scale: float, prior: str
) -> None:
    """A head without a bias, so that features and weights in other units are the same model."""
    head, rows = material(n=150)
    rows = Features(rows.phi, rows.phi @ head.weight.T, rows.y)

    def module(factor: float) -> np.ndarray:
        own = LinearHead(head.weight / factor, np.zeros(4))
        scaled = Features(rows.phi * factor, rows.z, rows.y)
        state = registry.fit(NAMES[structure], own, "classification", of(scaled), {"prior": prior})
        assert "prior_unlimited" not in state.settings
        spread = PAGES[structure].spread(state, scaled.phi, rows.z)
        q = np.exp(links.log_probs(rows.z, spread, 1.0, 1.0))
        return np.asarray(0.5 * np.abs(q - links.softmax(rows.z)).sum(1))

    moved = module(scale)
    if prior == "epsilon":
        assert moved.mean() == pytest.approx(0.01, rel=0.4)  # of held-out rows exactly
    elif scale > 1:  # the bias is a small feature there, and a large one in the other
        np.testing.assert_allclose(moved, module(scale * 10), rtol=0.1, atol=1e-3)


def test_a_rule_that_sets_no_prior_says_so() -> None:
    head, rows = material("regression", n=400)
    state = registry.fit(
        "laplace", head, "regression", of(rows), {"prior": "epsilon", "epsilon": 0.5}
    )
    assert state.settings["prior_unlimited"] is True
    state = registry.fit("laplace", head, "regression", of(rows), {"prior": "epsilon"})
    assert state.settings["prior"] == "epsilon"


def test_the_searches_end_where_they_say() -> None:
    assert by_epsilon(lambda d: 1e30 / d, 0.5, 1e-3) == pytest.approx(2e30, rel=1e-6)
    assert by_epsilon(lambda d: 0.1, 0.5, 1e-3) == 1e-3
    assert by_held_out(lambda d: np.log(d) ** 2, 1e-9, 1e9) < 1.0
    assert by_held_out(lambda d: 0.0, 1e-9, 1e9) == pytest.approx(1e-9)


@structures
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_features_far_from_zero_keep_their_curvature_in_float32(structure: str, task: Any) -> None:
    """Products of features at 1,000 with a spread of 1 hold nothing of it in float32."""
    head, rows = material(task, n=5_000)
    phi = (rows.phi + 1_000.0).astype(np.float32)
    near = phi.astype(np.float64) - 1_000.0
    z = (near @ head.weight.T + head.bias).astype(np.float32)
    y = rows.y if task == "classification" else z + rows.y - rows.z
    far = LinearHead(head.weight, head.bias - 1_000.0 * head.weight.sum(1))
    page, given = PAGES[structure], {"prior_precision": 1.0}
    got = fitted(page, far, Features(phi, z, y), task, **given)
    want = fitted(
        page, far, Features(phi.astype(np.float64), z.astype(np.float64), y), task, **given
    )
    few = phi[:50]
    np.testing.assert_allclose(
        page.spread(got, few, z[:50]).variance, page.spread(want, few, z[:50]).variance, rtol=1e-5
    )


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_rows_that_trained_the_head_leave_fewer_degrees_of_freedom(structure: str) -> None:
    """Bishop 2006, PRML 3.95; rows that did not are all free."""
    head, rows = material("regression", n=40)
    page, residual = PAGES[structure], ((rows.y - rows.z) ** 2).sum(0)
    state = fitted(page, head, rows, "regression", prior_precision=1.0)
    noise = np.asarray(state.settings["noise_variance"])
    gram = np.concatenate([rows.phi, np.ones((40, 1))], 1)
    mu = np.linalg.eigvalsh(gram.T @ gram) if structure != "diag" else (gram**2).sum(0)
    gamma = (mu[:, None] / (mu[:, None] + noise)).sum(0)
    np.testing.assert_allclose(noise, residual / (40 - gamma), rtol=1e-8)
    fresh = fitted(page, head, rows, "regression", prior_precision=1.0, train_rows=4_000)
    np.testing.assert_allclose(fresh.settings["noise_variance"], residual / 40, rtol=1e-12)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_the_prior_is_of_all_weights_or_of_those_that_softmax_sees(structure: str) -> None:
    head, rows = material()
    page = PAGES[structure]
    theta = np.concatenate([head.weight, head.bias[:, None]], 1)
    for folded, seen in ((True, theta - theta.mean(0)), (False, theta)):
        stats, settings = summed(page, head, rows, "classification", fold_bias=folded)
        norm = page.spectrum(stats, head, settings).norm
        assert norm == pytest.approx((seen**2).sum(), rel=1e-12)


def test_the_gradient_of_a_sure_row_keeps_its_digits_in_float32() -> None:
    y = np.asarray([0, 1, 2])
    z = (18.0 * np.eye(3)[y] + np.asarray([0.1, 0.2, 0.3])).astype(np.float32)
    p = links.softmax(z)
    want = p.copy()
    for row, own in enumerate(y):
        want[row, own] = -sum(p[row, c] for c in range(3) if c != own)
    got = sums.gradients(Features(None, z, y))
    np.testing.assert_allclose(got, want, rtol=1e-5)
