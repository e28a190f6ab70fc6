"""Covariances against dense algebra."""

from __future__ import annotations

import numpy as np
import pytest

from posthoc.contract import FitError
from posthoc.methods.vbll.covariance import (
    DAMPING,
    MAX_DENSE,
    Dense,
    Diagonal,
    LowRank,
    check_dense,
    inverse,
    quadratic,
)

K, P, N = 3, 6, 40
PRIOR, KAPPA = 0.3, 2.0


def seen(epochs: int = 1, rank: int = 2) -> tuple[list, np.ndarray, np.ndarray, np.ndarray]:
    """(the three covariances after some epochs on the same rows, curvature K×P×P, x, weights)."""
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal(size=(N, P - 1)) @ rng.normal(size=(P - 1, P - 1)), np.ones((N, 1))], 1
    )
    w = rng.uniform(size=(N, K))
    start = w.T @ x**2
    found = [
        Diagonal(start.copy()),
        LowRank(start.copy(), rank, np.random.default_rng(1)),
        Dense(start.copy()),
    ]
    curvature = np.stack([np.diag(row) for row in start])
    true = np.einsum("nk,np,nq->kpq", w, x, x)
    for _ in range(epochs):
        for c in found:
            c.add(x[:25], w[:25])
            c.add(x[25:], w[25:])
            c.settle()
        curvature = curvature + DAMPING * (true - curvature)
    for c in found:
        c.update(PRIOR, KAPPA)
    return found, curvature, x, w


def dense_of(tensors: dict) -> np.ndarray:
    """S K×P×P of a state's tensors."""
    if "factor" in tensors:
        return tensors["factor"] @ tensors["factor"].transpose(0, 2, 1)
    s = np.stack([np.diag(v) for v in tensors["variance"]])
    if "reduction" in tensors:
        s = s - tensors["reduction"] @ tensors["reduction"].transpose(0, 2, 1)
    return s


def test_the_best_covariance_is_the_inverse_precision() -> None:
    (diagonal, low, dense), curvature, _, _ = seen(2)
    precision = KAPPA * curvature + np.eye(P) / PRIOR
    np.testing.assert_allclose(dense_of(dense.tensors()), np.linalg.inv(precision), rtol=1e-9)
    want = 1 / np.diagonal(precision, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal.tensors()["variance"], want, rtol=1e-12)
    # Low rank: the diagonal of the precision is exact, and its rest is positive semidefinite.
    found = np.linalg.inv(dense_of(low.tensors()))
    np.testing.assert_allclose(
        np.diagonal(found, axis1=1, axis2=2), np.diagonal(precision, axis1=1, axis2=2), rtol=1e-9
    )


@pytest.mark.parametrize("rank", [P, 3 * P])
def test_every_direction_is_dense(rank: int) -> None:
    (_, low, dense), _, _, _ = seen(3, rank)
    np.testing.assert_allclose(
        dense_of(low.tensors()), dense_of(dense.tensors()), rtol=1e-8, atol=1e-10
    )


def test_low_rank_lies_between_diagonal_and_dense() -> None:
    found, curvature, _, _ = seen(12)
    precision = KAPPA * curvature + np.eye(P) / PRIOR

    def bound(c: Diagonal | LowRank | Dense) -> float:
        data = np.einsum("kpq,kqp->", dense_of(c.tensors()), precision)
        return float(0.5 * (c.log_det() - data))

    diagonal, low, dense = (bound(c) for c in found)
    assert diagonal < low < dense
    assert low - diagonal > 0.2 * (dense - diagonal)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["diagonal", "lowrank", "dense"])
def test_sums_and_quadratic_forms(kind: int) -> None:
    found, _, x, _ = seen(2)
    c = found[kind]
    s = dense_of(c.tensors())
    assert c.trace() == pytest.approx(np.trace(s, axis1=1, axis2=2).sum(), rel=1e-9)
    assert c.log_det() == pytest.approx(np.linalg.slogdet(s)[1].sum(), rel=1e-9)
    want = np.einsum("np,kpq,nq->nk", x, s, x)
    np.testing.assert_allclose(quadratic(c.tensors(), x), want, rtol=1e-9)


def test_woodbury() -> None:
    rng = np.random.default_rng(3)
    a, v = rng.uniform(0.5, 2.0, (K, P)), rng.normal(size=(K, P, 2))
    s, g, log_det = inverse(a, v)
    for k in range(K):
        want = np.linalg.inv(np.diag(a[k]) + v[k] @ v[k].T)
        np.testing.assert_allclose(np.diag(s[k]) - g[k] @ g[k].T, want, rtol=1e-9, atol=1e-12)
        assert log_det[k] == pytest.approx(np.linalg.slogdet(want)[1])


def test_features_without_curvature_keep_the_prior() -> None:
    x = np.concatenate([np.zeros((5, P - 1)), np.ones((5, 1))], 1)
    for c in (Diagonal(np.zeros((K, P))), LowRank(np.zeros((K, P)), 2, np.random.default_rng(0))):
        c.add(x, np.ones((5, K)))
        c.settle()
        c.update(PRIOR, 1.0)
        s = dense_of(c.tensors())
        np.testing.assert_allclose(s[:, 0, 0], PRIOR, rtol=1e-9)
        assert (s[:, -1, -1] < PRIOR).all()


def test_too_many_numbers_are_refused() -> None:
    check_dense(8, 2048, "vbll")
    with pytest.raises(FitError, match=r"vbll: 9 dense .* covariance=diagonal"):
        check_dense(9, 2048, "vbll")
    assert MAX_DENSE * 8 == 2**28
