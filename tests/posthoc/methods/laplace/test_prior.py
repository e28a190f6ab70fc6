"""The precision of the prior: what each rule promises, found another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from posthoc import links, registry
from posthoc.contract import Features, FitError, LinearHead, State
from posthoc.links import Spread
from posthoc.methods.laplace import criteria, identity
from posthoc.methods.laplace.prior import FLAT, log_evidence
from posthoc.rows import of, take
from tests.posthoc.methods.laplace.material import PAGES, fitted, material, summed

NAMES = {
    "kron": "laplace",
    "diag": "laplace_diag",
    "full": "laplace_full",
    "identity": "icla",
}
structures = pytest.mark.parametrize("structure", PAGES)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("given", [{}, {"fold_bias": False}, {"train_rows": 900}], ids=str)
def test_the_precision_found_maximises_the_evidence(structure: str, given: dict[str, Any]) -> None:
    head, rows = material()
    page = PAGES[structure]
    stats, settings = summed(page, head, rows, "classification", **given)
    state = page.finish(stats, head, settings)
    best = state.settings["prior_precision"]
    assert state.settings["fixed_point_steps"] < 20
    spectrum = page.spectrum(stats, head, settings)
    at = [log_evidence(spectrum, best * f, 0.0) for f in (0.98, 1.0, 1.02)]
    assert at[1] > at[0] and at[1] > at[2]


def test_the_evidence_of_a_regression_is_stationary() -> None:
    head, rows = material("regression")
    state = fitted(PAGES["kron"], head, rows, "regression")
    noise = np.asarray(state.settings["noise_variance"])
    precision = state.settings["prior_precision"]
    phi = np.concatenate([rows.phi, np.ones((len(rows), 1))], 1)
    mu = np.linalg.eigvalsh(phi.T @ phi)
    squared = ((rows.y - rows.z) ** 2).sum(0)
    theta = (head.weight**2).sum() + (head.bias**2).sum()

    def evidence(x: np.ndarray) -> float:
        d, s = np.exp(x[0]), np.exp(x[1:])
        fit = -0.5 * (len(rows) * np.log(s) + squared / s).sum()
        return float(fit - 0.5 * (np.log1p(np.divide.outer(mu, s) / d).sum() + d * theta))

    x = np.log([precision, *noise])
    for step in 1e-4 * np.eye(len(x)):
        slope = (evidence(x + step) - evidence(x - step)) / 2e-4
        assert abs(slope) < 1e-4


def at_precision(
    structure: str, head: LinearHead, rows: Features, held: Features, task: Any
) -> Any:
    """The spread of held-out rows as a function of the precision, through the whole fit."""

    def spread(precision: float) -> tuple[State, Spread]:
        page = PAGES[structure]
        state = fitted(page, head, rows, task, prior_precision=precision)
        return state, page.spread(state, held.phi, held.z)

    return spread


@structures
def test_held_out_likelihood_chooses_what_a_slow_search_chooses(structure: str) -> None:
    head, rows = material(n=200)
    rows = Features(rows.phi, rows.z * 2, rows.y)  # too sure, so that the precision matters
    state = registry.fit(NAMES[structure], head, "classification", of(rows), {"prior": "heldout"})
    assert state.settings["rows"] == 200  # held-out rows join the posterior in the end
    assert state.settings["prior"] == "heldout"
    kept, held = of(rows).hold_out()
    rest = next(iter(kept))
    if structure == "identity":
        held = rows
    spread = at_precision(structure, head, rest, held, "classification")

    def loss(log_precision: float) -> float:
        _, found = spread(float(np.exp(log_precision)))

        def nll(log_t: float) -> float:
            log_p = links.log_probs(held.z, found, float(np.exp(log_t)), 1.0)
            return float(-log_p[np.arange(len(held)), held.y].mean())

        return float(minimize_scalar(nll, bounds=(-5, 5), method="bounded").fun)

    def widening(log_precision: float) -> float:
        return float(np.pi / 8 * np.median(spread(float(np.exp(log_precision)))[1].variance))

    found = np.log(state.settings["prior_precision"])
    grid = np.linspace(found - 1, found + 12, 40)
    best = min(loss(x) for x in grid if widening(x) <= 1)
    assert loss(found) <= best + FLAT + 1e-5
    assert loss(found - 0.05) > best + FLAT - 1e-5 or widening(found - 0.05) > 1
    assert widening(found) < 1 + 1e-6


@structures
def test_held_out_likelihood_of_a_regression(structure: str) -> None:
    head, rows = material("regression", n=60)
    state = registry.fit(NAMES[structure], head, "regression", of(rows), {"prior": "heldout"})
    kept, held = of(rows).hold_out()
    rest = next(iter(kept))
    if structure == "identity":
        rest = held = rows
    spread = at_precision(structure, head, rest, held, "regression")

    def loss(log_precision: float) -> float:
        fit, found = spread(float(np.exp(log_precision)))
        total = np.asarray(fit.settings["noise_variance"]) + found.variance

        def nll(log_f: float) -> float:
            scale = np.sqrt(total) * np.exp(log_f)
            return float(-norm.logpdf(held.y, held.z, scale).mean())

        return float(minimize_scalar(nll, bounds=(-5, 5), method="bounded").fun)

    found = np.log(state.settings["prior_precision"])
    best = min(loss(x) for x in np.linspace(found - 1, found + 12, 60))
    assert loss(found) <= best + FLAT + 1e-5
    assert loss(found - 0.05) > best + FLAT - 1e-4 or state.settings["prior_unlimited"]


@structures
@pytest.mark.parametrize("epsilon", [0.002, 0.01])
def test_the_label_free_rule_spends_its_whole_allowance(structure: str, epsilon: float) -> None:
    head, rows = material(n=200)
    blind = Features(rows.phi, rows.z)
    given = {"prior": "epsilon", "epsilon": epsilon}
    state = registry.fit(NAMES[structure], head, "classification", of(blind), given)
    assert state.settings["uncalibrated"] is True and state.settings["epsilon"] == epsilon
    kept, held = of(blind).hold_out()
    if structure == "identity":
        held = blind
    spread = at_precision(structure, head, next(iter(kept)), held, "classification")
    _, found = spread(state.settings["prior_precision"])
    q = np.exp(links.log_probs(held.z, found, 1.0, 1.0))
    distance = 0.5 * np.abs(q - links.softmax(held.z)).sum(1).mean()
    assert distance == pytest.approx(epsilon, rel=1e-6)


def test_the_label_free_rule_of_a_regression_is_a_distance_of_gaussians() -> None:
    head, rows = material("regression", n=60)
    given = {"prior": "epsilon", "epsilon": 0.02}
    state = registry.fit("icla", head, "regression", of(rows), given)
    noise = np.asarray(state.settings["noise_variance"])
    v = identity.spread(state, rows.phi, rows.z).variance

    def distance(a: float, b: float) -> float:
        return quad(lambda x: abs(norm.pdf(x, 0, a) - norm.pdf(x, 0, b)) / 2, -12, 12, limit=200)[0]

    found = [
        distance(float(np.sqrt(s)), float(np.sqrt(s + e)))
        for row in v[:3]
        for s, e in zip(noise, row, strict=True)
    ]
    all_rows = criteria.gaussian_variation(1 + v / noise)
    assert np.mean(found) == pytest.approx(criteria.gaussian_variation(1 + v[:3] / noise), 1e-5)
    assert all_rows == pytest.approx(0.02, rel=1e-6)


def test_a_given_precision_holds_no_rows_out() -> None:
    head, rows = material()
    settings = registry.settings("laplace", {"prior_precision": 3.0})
    assert (
        not settings.needs_held_out
        and registry.settings("laplace", {"prior": "epsilon"}).needs_held_out
    )
    state = registry.fit("laplace", head, "classification", of(rows), {"prior_precision": 3.0})
    assert state.settings["prior"] == "given" and state.settings["prior_precision"] == 3.0


@structures
def test_rules_say_what_they_miss(structure: str) -> None:
    head, rows = material()
    name = NAMES[structure]
    with pytest.raises(FitError, match="heldout needs labels"):
        blind = Features(rows.phi, rows.z)
        registry.fit(name, head, "classification", of(blind), {"prior": "heldout"})
    if structure == "identity":
        return
    few = of(take(rows, slice(0, 3)))
    for rule in ("heldout", "epsilon"):
        with pytest.raises(FitError, match="needs rows that the posterior has not seen"):
            registry.fit(name, head, "classification", few, {"prior": rule})
    flat = LinearHead(np.ones_like(head.weight), np.ones_like(head.bias))
    with pytest.raises(FitError, match="all equal"):
        registry.fit(name, flat, "classification", of(rows), {})
    zero = LinearHead(np.zeros_like(head.weight), np.zeros_like(head.bias))
    noisy = Features(rows.phi, rows.z, rows.z + 1)
    with pytest.raises(FitError, match="all zero"):
        registry.fit(name, zero, "regression", of(noisy), {})


def test_more_rows_than_a_rule_looks_at_are_thinned_evenly() -> None:
    n, c = 3_000, 1_000
    rows = Features(np.arange(n, dtype=float)[:, None], np.zeros((n, c), np.float32), np.arange(n))
    blocks = [take(rows, slice(i, i + 700)) for i in range(0, n, 700)]
    kept = criteria.thinned(blocks, n)
    np.testing.assert_array_equal(kept.y, np.arange(0, n, 3))
    np.testing.assert_array_equal(kept.phi[:, 0], np.arange(0, n, 3))
    whole = criteria.thinned([take(rows, slice(0, 10))], 10)
    np.testing.assert_array_equal(whole.y, np.arange(10))
