"""Mahalanobis distance of the features to their common mean: the score of a regression.

score = (phi - mu)' S^-1 (phi - mu); Lee et al. 2018 (arXiv:1807.03888) with a single class, the
covariance shrunk because features of a narrow network are often collinear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State
from posthoc.ood.gaussian import ClassSums, add, empty, join, shrunk_inverse

INFO = Info(
    name="mahalanobis",
    kind="score",
    tasks=("classification", "regression"),
    needs=frozenset({"features"}),
    summary="Mahalanobis distance of the features to their common mean",
    paper=Paper(
        "A Simple Unified Framework for Detecting Out-of-Distribution Samples "
        "and Adversarial Attacks",
        2018,
        "https://arxiv.org/abs/1807.03888",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment


def init(n_classes: int, n_features: int) -> ClassSums:
    """No rows."""
    del n_classes
    return empty(1, n_features)


def update(stats: ClassSums, batch: Features) -> ClassSums:
    """Add the features of a batch."""
    return add(stats, batch, by_class=False)


def merge(a: ClassSums, b: ClassSums) -> ClassSums:
    """The sums of both."""
    return join(a, b)


def finish(stats: ClassSums, head: LinearHead | None = None) -> State:
    """Mean and a factor of the inverse covariance.

    Raises FitError for fewer than two rows or constant features.
    """
    del head
    if stats.n < 2:
        raise FitError(f"mahalanobis needs at least two rows and has {int(stats.n)}")
    mean = stats.mean
    inverse, rho = shrunk_inverse(stats.outer - stats.n * np.outer(mean, mean), stats.n)
    factor = np.linalg.cholesky((inverse + inverse.T) / 2)
    return State(
        {"factor": factor, "offset": -mean @ factor},
        {"rows": int(stats.n), "shrinkage": rho},
    )


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D (float64 definition)."""
    del z
    t = state.tensors
    return np.asarray(((np.asarray(phi, np.float64) @ t["factor"] + t["offset"]) ** 2).sum(1))


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del z
    assert phi is not None
    t = state.tensors
    white = g.op("Gemm", phi, g.const(t["factor"]), g.const(t["offset"]))
    return g.sum(g.op("Mul", white, white), 1)
