"""Refitted classifiers against scikit-learn and scipy, and their limits."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from posthoc import registry
from posthoc.contract import Features, FitError, LinearHead
from posthoc.methods.heads import members, mixup
from posthoc.methods.heads.weights import dirichlet
from posthoc.rows import BLOCK, of
from tests.posthoc.methods.heads.material import C, D, N, classes, deviations, fit, frozen

PRECISION = 0.5
every = pytest.mark.parametrize("name", ["bootstrap", "nptl", "mixup"])


def refitted(phi: Any, y: Any, weight: Any) -> np.ndarray:
    """scikit-learn's penalised multinomial regression, (D+1)×C."""
    model = LogisticRegression(C=1 / PRECISION, fit_intercept=False, tol=1e-9, max_iter=5000)
    return np.asarray(model.fit(phi, y, weight).coef_.T)


def augmented(rows: Features) -> np.ndarray:
    assert rows.phi is not None
    return np.concatenate([rows.phi, np.ones((len(rows), 1))], 1)


def weights_of(state: Any) -> np.ndarray:
    """Members S×(D+1)×C."""
    t = state.tensors
    bias = t["bias"] - np.tensordot(t["centre"], t["weight"], 1)
    return np.concatenate([t["weight"], bias[None]]).swapaxes(0, 1)


def loss(heads: np.ndarray, rows: Features, weight: np.ndarray) -> np.ndarray:
    """The penalised loss of one head (D+1)×C beside the frozen one, under weights N×C of labels."""
    logits = rows.z + augmented(rows) @ heads
    log_p = logits - logsumexp(logits, axis=1, keepdims=True)
    return -(weight * log_p).sum() + 0.5 * PRECISION * (heads**2).sum()


def test_scikit_learn_reaches_the_same_bootstrap() -> None:
    head = frozen(zero=True)  # scikit-learn's penalty is towards zero
    rows = classes(head, BLOCK + 300)
    state = fit("bootstrap", head, rows, members=3, prior_precision=PRECISION, seed=7)
    assert state.settings["converged"] == 3
    weights = dirichlet(7, len(rows), 3)
    w = np.concatenate([weights.of(0, BLOCK, range(3))[0], weights.of(1, 300, range(3))[0]])
    for m, got in enumerate(weights_of(state)):
        want = refitted(augmented(rows), rows.y, w[:, m])
        target = w[:, m : m + 1] * np.eye(C)[rows.y]
        assert loss(got, rows, target) == pytest.approx(loss(want, rows, target), rel=1e-6)
        np.testing.assert_allclose(got, want, atol=1e-3)


def test_scipy_reaches_the_same_nptl_around_a_frozen_head() -> None:
    head = frozen()
    rows = classes(head)
    state = fit("nptl", head, rows, members=3, prior_precision=PRECISION, alpha=50.0)
    assert state.settings["converged"] == 3
    w, v = dirichlet(0, N, 3, 50.0).of(0, N, range(3))
    for m, got in enumerate(weights_of(state)):
        target = w[:, m : m + 1] * np.eye(C)[rows.y] + v[:, m : m + 1] * softmax(rows.z, 1)

        def value(x: np.ndarray, target: np.ndarray = target) -> float:
            return float(loss(x.reshape(D + 1, C), rows, target))

        best = minimize(value, np.zeros((D + 1) * C), options={"gtol": 1e-3})
        assert loss(got, rows, target) <= best.fun * (1 + 1e-6)
        np.testing.assert_allclose(
            softmax(rows.z + augmented(rows) @ got, 1),
            softmax(rows.z + augmented(rows) @ best.x.reshape(D + 1, C), 1),
            atol=1e-3,
        )


def test_scikit_learn_reaches_the_same_mixup() -> None:
    head = frozen(zero=True)
    rows = classes(head)
    chosen = {"mixup_alpha": 0.5, "mixup_weight": 0.6, "mixup_share": 1.5}
    state = fit("mixup", head, rows, members=2, prior_precision=PRECISION, **chosen)
    phi, y = augmented(rows), np.asarray(rows.y)
    for m, got in enumerate(weights_of(state)):
        parts = [(phi, y, np.ones(N))]
        for i, j, t in mixup.pairs(mixup.Settings(**chosen), 0, N, m):
            between = t * phi[i] + (1 - t) * phi[j]
            parts += [(between, y[i], 0.6 * t[:, 0]), (between, y[j], 0.6 * (1 - t[:, 0]))]
        want = refitted(*(np.concatenate(p) for p in zip(*parts, strict=True)))
        np.testing.assert_allclose(got, want, atol=1e-3)


def test_as_alpha_vanishes_nptl_is_the_bootstrap() -> None:
    head = frozen()
    rows = classes(head)
    plain = deviations("bootstrap", fit("bootstrap", head, rows, members=4), rows)
    near = deviations("nptl", fit("nptl", head, rows, members=4, alpha=1e-9), rows)
    np.testing.assert_allclose(near, plain, atol=2e-3)


def test_as_alpha_grows_nptl_is_the_frozen_head() -> None:
    head = frozen()
    rows = classes(head)
    size = [
        np.abs(deviations("nptl", fit("nptl", head, rows, members=4, alpha=a), rows)).max()
        for a in (1.0, 100.0, 1e4, 1e8)
    ]
    assert size == sorted(size, reverse=True) and size[0] > 0.5
    assert size[-1] < 1e-3


@every
def test_a_strong_prior_is_the_frozen_head_and_a_weak_one_is_not(name: str) -> None:
    head = frozen()
    rows = classes(head)
    size = [
        np.abs(deviations(name, fit(name, head, rows, prior_precision=p, members=3), rows)).max()
        for p in (1e-3, 1.0, 1e3, 1e12)
    ]
    assert size == sorted(size, reverse=True) and size[0] > 0.5
    assert size[-1] < 1e-9


@every
def test_members_differ_and_their_mean_over_classes_is_zero(name: str) -> None:
    head = frozen()
    rows = classes(head)
    draws = deviations(name, fit(name, head, rows, members=5), rows)
    assert draws.shape == (N, 5, C)
    assert draws.std(1).mean() > 0.02
    np.testing.assert_allclose(draws.mean(2), 0.0, atol=1e-6)


@every
def test_groups_of_members_are_as_good_as_all_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = frozen()
    rows = classes(head)
    together = deviations(name, fit(name, head, rows, members=5), rows)
    monkeypatch.setattr(members, "MEMORY", 1)
    alone = deviations(name, fit(name, head, rows, members=5), rows)
    np.testing.assert_allclose(alone, together, rtol=1e-6, atol=1e-6)
    more = deviations(name, fit(name, head, rows, members=7), rows)
    np.testing.assert_allclose(more[:, :5], together, rtol=1e-6, atol=1e-6)


@every
def test_separable_rows_and_missing_classes_keep_weights_finite(name: str) -> None:
    head = frozen()
    rows = classes(head)
    # One class never occurs, and the features tell the other two apart without error.
    y = (rows.phi[:, 0] > 0).astype(np.int64)
    apart = Features(rows.phi + 3 * (2 * y[:, None] - 1), rows.z, y)
    # The frozen head's own labels, of which nptl takes as many as 100 rows, are other ones.
    state = fit(name, head, apart, **({"alpha": 1.0} if name == "nptl" else {}))
    assert np.isfinite(weights_of(state)).all() and np.abs(weights_of(state)).max() < 100
    p = softmax(apart.z[:, None] + deviations(name, state, apart), 2).mean(1)
    assert (p.argmax(1) == y).mean() > 0.95


def test_the_default_precision_maximises_the_evidence() -> None:
    head = frozen()
    rows = classes(head)
    found = fit("bootstrap", head, rows, members=2).settings["prior_precision"]
    p, phi = softmax(rows.z, 1), augmented(rows)
    curved = sum(np.diag(q) - np.outer(q, q) for q in p) / N
    theta = np.concatenate([head.weight, head.bias[:, None]], 1)
    theta = theta - theta.mean(0)
    h = np.linalg.eigvalsh(np.kron(curved, phi.T @ phi))

    def log_evidence(d: float) -> float:
        return float(-0.5 * np.log1p(h.clip(0) / d).sum() - 0.5 * d * (theta**2).sum())

    best = log_evidence(found)
    assert best > log_evidence(0.97 * found) and best > log_evidence(1.03 * found)


def test_what_a_fit_says_of_itself() -> None:
    head = frozen()
    state = fit("bootstrap", head, classes(head), members=6, iterations=1, seed=3)
    said = state.settings
    assert (said["members"], said["iterations"], said["seed"], said["rows"]) == (6, 1, 3, N)
    assert said["steps"] == 1 and said["converged"] == 0 and said["largest_gradient"] > 0
    done = fit("bootstrap", head, classes(head), members=6, seed=3).settings
    assert done["converged"] == 6 and done["steps"] > 1
    assert done["largest_gradient"] ** 2 / 2 <= members.TOLERANCE * N


def test_seeds_give_other_members() -> None:
    head = frozen()
    rows = classes(head)
    a, b = (deviations("bootstrap", fit("bootstrap", head, rows, seed=s), rows) for s in (0, 1))
    assert np.abs(a - b).max() > 0.01


@every
def test_too_many_members_are_refused_with_a_number_that_fits(name: str) -> None:
    head = LinearHead(np.ones((1000, 300)), np.zeros(1000))
    rows = Features(np.ones((2, 300), np.float32), np.zeros((2, 1000)), np.zeros(2, np.int64))
    with pytest.raises(FitError, match=f"{name}: 1000 heads .* members=664"):
        fit(name, head, rows, members=1000)


def test_a_head_that_predicts_nothing_has_no_evidence() -> None:
    head = frozen(zero=True)
    with pytest.raises(FitError, match="all equal"):
        fit("bootstrap", head, classes(head))


def test_memory_of_a_fit_is_that_of_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    c, d, n, s = 40, 63, 64, 60
    head = LinearHead(rng.normal(size=(c, d)), rng.normal(size=c))
    phi = rng.normal(size=(n, d)).astype(np.float32)
    z = (phi @ head.weight.T).astype(np.float32)
    rows = Features(phi, z, rng.integers(c, size=n))
    one = members.ARRAYS * 4 * c * (d + 1)  # 287 kB
    monkeypatch.setattr(members, "MEMORY", 5 * one)
    monkeypatch.setattr("posthoc.methods.heads.losses.WORK", n * c)
    tracemalloc.start()
    try:
        registry.fit("bootstrap", head, "classification", of(rows), {"members": s})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2 * one < peak < 5 * one + 3_000_000 < s * one / 3
