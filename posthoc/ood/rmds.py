"""Relative Mahalanobis distance to the class means (Ren et al. 2021, arXiv:2106.09022).

score = min_c (phi - mu_c)' S^-1 (phi - mu_c) - (phi - mu)' S0^-1 (phi - mu), with S the covariance
within classes and S0 around the common mean. Both quadratic forms share one D×D product: with
psi = phi - mu the score is psi'(S^-1 - S0^-1)psi + min_c (-2 psi'S^-1 nu_c + nu_c'S^-1 nu_c).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State
from posthoc.ood.gaussian import ClassSums, add, empty, join, shrunk_inverse

INFO = Info(
    name="rmds",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"features", "labels"}),
    summary="relative Mahalanobis distance of the features",
    paper=Paper(
        "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection",
        2021,
        "https://arxiv.org/abs/2106.09022",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment


def init(n_classes: int, n_features: int) -> ClassSums:
    """No rows."""
    return empty(n_classes, n_features)


def update(stats: ClassSums, batch: Features) -> ClassSums:
    """Add the features and labels of a batch."""
    return add(stats, batch, by_class=True)


def merge(a: ClassSums, b: ClassSums) -> ClassSums:
    """The sums of both."""
    return join(a, b)


def finish(stats: ClassSums, head: LinearHead | None = None) -> State:
    """Means and inverse covariances; classes without rows are left out.

    Raises FitError for fewer than two classes with rows, or features that are constant within
    every class.
    """
    del head
    seen = stats.count > 0
    if seen.sum() < 2:
        raise FitError(f"rmds needs rows of at least two classes and has {int(seen.sum())}")
    mean, n = stats.mean, stats.n
    means = stats.total[seen] / stats.count[seen][:, None]
    between = (means * stats.count[seen][:, None]).T @ means
    within, rho = shrunk_inverse(stats.outer - between, n)
    common, rho0 = shrunk_inverse(stats.outer - n * np.outer(mean, mean), n)
    nu = means - mean
    linear = within @ nu.T
    return State(
        {
            "mean": mean,
            "quadratic": within - common,
            "linear": -2.0 * linear,
            "constant": (nu * linear.T).sum(1),
        },
        {"rows": int(n), "classes_seen": int(seen.sum()), "shrinkage": [rho, rho0]},
    )


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D (float64 definition)."""
    del z
    t = state.tensors
    psi = np.asarray(phi, np.float64) - t["mean"]
    own = psi @ t["linear"] + t["constant"]
    return np.asarray(((psi @ t["quadratic"]) * psi).sum(1) + own.min(1))


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del z
    assert phi is not None
    t = state.tensors
    psi = g.op("Sub", phi, g.const(t["mean"]))
    # min x as -max -x: ONNX Runtime's ReduceMin is several times slower than its ReduceMax.
    near = g.op("Gemm", psi, g.const(-t["linear"]), g.const(-t["constant"]))
    square = g.sum(g.op("Mul", g.op("MatMul", psi, g.const(t["quadratic"])), psi), 1)
    return g.op("Sub", square, g.reduce("ReduceMax", near, 1))
