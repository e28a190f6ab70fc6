"""The generative layer against slow loops, brute-force leaving out, and sampling."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from posthoc import registry
from posthoc.contract import Features, FitError, LinearHead, State
from posthoc.methods.vbll import generative
from posthoc.methods.vbll.classes import left_out_scores, posterior
from posthoc.methods.vbll.within import measure_classes, within_of
from posthoc.rows import of, take
from tests.posthoc.methods.vbll.material import classes

KINDS = ["diagonal", "dense"]


def gaussians(n: int = 300, seed: int = 0) -> tuple[LinearHead, Features]:
    """Correlated Gaussian classes under an uninformed frozen head."""
    rng = np.random.default_rng(seed)
    d, c = 5, 4
    mix = np.eye(d) + 0.6 * np.eye(d, k=1)
    means = 2.0 * np.random.default_rng(8).normal(size=(c, d))
    y = rng.integers(0, c, n)
    phi = (means[y] + rng.normal(size=(n, d))) @ mix + 3.0
    head = LinearHead(0.1 * np.random.default_rng(9).normal(size=(c, d)), np.zeros(c))
    return head, Features(phi, phi @ head.weight.T, y)


def fit(rows: Features, head: LinearHead, **settings) -> State:
    return registry.fit("vbll_generative", head, "classification", of(rows, 64), settings)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_log_densities(kind: str) -> None:
    head, rows = gaussians()
    state = fit(rows, head, covariance=kind)
    t, f = state.tensors, state.settings["temperature"]
    u = within_of(t)(rows.phi[:20])
    own = np.zeros((20, 4))
    for c in range(4):
        density = multivariate_normal(t["mean"][c], (1 + t["variance"][c]) * np.eye(5))
        own[:, c] = (density.logpdf(u) + t["log_prior"][c]) / f
    shift = own - rows.z[:20]
    shift -= shift.mean(1, keepdims=True)
    got = generative.spread(state, rows.phi[:20], rows.z[:20]).shift
    np.testing.assert_allclose(got, shift, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_make_classes_unit(kind: str) -> None:
    _, rows = gaussians(4000)
    measured = measure_classes(of(rows, 500), 4, kind == "dense")
    u = measured.within(rows.phi)
    for c in range(4):
        np.testing.assert_allclose(u[rows.y == c].mean(0), measured.means[c], atol=1e-9)
    left = u - measured.means[rows.y]
    pooled = left.T @ left / len(left)
    np.testing.assert_allclose(np.diag(pooled), 1.0, atol=0.05)
    if kind == "dense":
        np.testing.assert_allclose(pooled, np.eye(5), atol=0.05)


def test_features_that_do_not_vary_within_classes_are_bounded() -> None:
    _, rows = gaussians(200)
    phi = rows.phi.copy()
    phi[:, 1] = 3.0 * rows.y  # varies between classes only
    phi[:, 2] = 7.0  # a constant
    for dense in (False, True):
        measured = measure_classes(of(Features(phi, rows.z, rows.y)), 4, dense)
        u = measured.within(phi)
        assert np.isfinite(u).all() and np.abs(u).max() < 500


def test_the_prior_variance_tops_the_evidence() -> None:
    rng = np.random.default_rng(0)
    counts, d = np.asarray([3, 10, 50, 1]), 30
    means = rng.normal(size=(4, d)) * 1.3 + rng.normal(size=(4, d)) / np.sqrt(counts)[:, None]

    def evidence(prior: float) -> float:
        # Of the class means; the rows about them do not depend on the prior.
        v = prior + 1 / counts
        return float((-0.5 * (means**2).sum(1) / v - 0.5 * d * np.log(v)).sum())

    best = posterior(counts, (means**2).sum(1), d, None).prior
    assert evidence(best) > max(evidence(best * 1.02), evidence(best / 1.02))


@pytest.mark.parametrize("kind", KINDS)
def test_left_out_scores_are_those_of_a_fit_without_the_row(kind: str) -> None:
    _, rows = gaussians(40)
    rows.y[:2] = [3, 3]
    keep = (rows.y != 3) | (np.arange(40) < 1)  # class 3 holds a single row
    rows = take(rows, keep)
    n, d = len(rows), 5
    measured = measure_classes(of(rows), 4, kind == "dense")
    u, y, kept = measured.within(rows.phi), rows.y, measured.kept
    q = posterior(measured.counts, (measured.means**2).sum(1), d, None)
    got = left_out_scores(u, y, measured.means, q, kept)
    left = u - measured.means[y]
    # In these coordinates the shrunk covariance is the identity, and `kept` of it is the rows'.
    rest = np.eye(d) - kept * left.T @ left / n
    for i in range(n):
        others = np.arange(n) != i
        counts = np.bincount(y[others], minlength=4)
        sums = np.zeros((4, d))
        np.add.at(sums, y[others], u[others])
        away = u[others] - (sums / np.maximum(counts, 1)[:, None])[y[others]]
        covariance = rest + kept * away.T @ away / n
        log_det = np.linalg.slogdet(covariance)[1]
        for c in range(4):
            v = 1 / (counts[c] + 1 / q.prior)
            e = u[i] - v * sums[c]
            square = e @ np.linalg.solve(covariance, e) / (1 + v)
            want = q.log_prior[c] - 0.5 * (square + d * np.log(1 + v))
            assert got[i, c] == pytest.approx(want, rel=1e-9)
        assert np.isfinite(log_det)  # common to all classes, and left out


def test_fluctuations_have_the_variance_of_sampled_scores() -> None:
    head, rows = gaussians(60)
    state = fit(rows, head)
    t, f = state.tensors, state.settings["temperature"]
    spread = generative.spread(state, rows.phi, rows.z)
    u = within_of(t)(rows.phi[:6])
    eps = np.random.default_rng(0).normal(size=(40_000, 1, *t["mean"].shape))
    means = t["mean"] + np.sqrt(t["variance"])[:, None] * eps[:, 0]
    for i in range(6):
        scores = -0.5 * ((u[i] - means) ** 2).sum(2) / f
        np.testing.assert_allclose(scores.var(0), spread.amplitude[i] ** 2, rtol=0.05)
    np.testing.assert_allclose(spread.directions, np.eye(4) - 0.25)


def test_far_away_it_fluctuates_more() -> None:
    head, rows = gaussians()
    state = fit(rows, head)
    near = generative.spread(state, rows.phi, rows.z).variance
    far = generative.spread(state, 5 * rows.phi, rows.z).variance
    assert np.median(far) > 5 * np.median(near)


def test_it_is_nearly_the_best_classifier_of_gaussian_classes() -> None:
    head, rows = gaussians(800)
    fresh = gaussians(2000, seed=1)[1]
    state = fit(rows, head)
    logits = fresh.z + generative.spread(state, fresh.phi, fresh.z).shift
    mix = np.eye(5) + 0.6 * np.eye(5, k=1)
    true = 2.0 * np.random.default_rng(8).normal(size=(4, 5)) @ mix + 3.0
    best = np.stack([multivariate_normal(m, mix.T @ mix).logpdf(fresh.phi) for m in true], 1)

    def nll(z: np.ndarray) -> float:
        return float((logsumexp(z, 1) - z[np.arange(len(z)), fresh.y]).mean())

    assert nll(logits) < nll(best) + 0.02
    # Its own scale was right: these classes are Gaussian, so that no temperature is needed.
    assert 0.7 < state.settings["temperature"] < 1.5


def test_repeated_features_are_tempered() -> None:
    # Naive Bayes counts a copied feature as new evidence; the temperature counts it once.
    head, rows = gaussians(400)
    wide = LinearHead(np.tile(head.weight, (1, 8)), head.bias)
    copies = Features(np.tile(rows.phi, (1, 8)), rows.z, rows.y)
    once, often = (
        fit(r, h, covariance="diagonal").settings["temperature"]
        for r, h in ((rows, head), (copies, wide))
    )
    assert often == pytest.approx(8 * once, rel=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_without_rows_keeps_the_frozen_odds(kind: str) -> None:
    head, rows = gaussians()
    few = take(rows, rows.y != 1)
    state = fit(few, head, covariance=kind)
    assert state.settings["classes_without_rows"] == 1
    spread = generative.spread(state, rows.phi, rows.z)
    moved, others = rows.z + spread.shift, [0, 2, 3]
    odds = moved[:, 1] - logsumexp(moved[:, others], 1)
    np.testing.assert_allclose(odds, rows.z[:, 1] - logsumexp(rows.z[:, others], 1), atol=1e-9)
    assert spread.amplitude.shape == (300, 3) and spread.directions.shape == (3, 4)


def test_one_class_is_refused() -> None:
    head, rows = classes()
    with pytest.raises(FitError, match="at least two classes"):
        fit(take(rows, rows.y == 1), head)


def test_memory_at_a_thousand_classes_and_2048_features() -> None:
    rng = np.random.default_rng(0)
    c, d, n = 1000, 2048, 64
    rows = Features(
        rng.normal(size=(n, d)).astype(np.float32),
        rng.normal(size=(n, c)).astype(np.float32),
        rng.integers(0, c, n),
    )
    head = LinearHead(np.zeros((c, d)), np.zeros(c))
    tracemalloc.start()
    state = fit(rows, head, covariance="diagonal")
    generative.spread(state, rows.phi, rows.z)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6
