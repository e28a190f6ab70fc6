"""Gaussian statistics of features by class, shared by the Mahalanobis scores. All sums: a fold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from posthoc.contract import F64, Features, FitError


@dataclass(frozen=True, slots=True)
class ClassSums:
    """``count`` C rows by class, ``total`` C×D sum of features, ``outer`` D×D sum of phi phi'."""

    count: F64
    total: F64
    outer: F64

    @property
    def n(self) -> float:
        """Rows seen."""
        return float(self.count.sum())

    @property
    def mean(self) -> F64:
        """Mean of all features, D."""
        return np.asarray(self.total.sum(0) / self.n)


def empty(n_classes: int, n_features: int) -> ClassSums:
    """No rows."""
    d = n_features
    return ClassSums(np.zeros(n_classes), np.zeros((n_classes, d)), np.zeros((d, d)))


def add(sums: ClassSums, batch: Features, *, by_class: bool) -> ClassSums:
    """Add a batch; with ``by_class`` its labels choose the class, else all rows are one class."""
    if batch.phi is None:
        raise FitError("this score needs features; the model is a black box")
    phi = np.asarray(batch.phi, np.float64)
    if not np.isfinite(phi).all():
        raise FitError("this score met features that are not finite")
    if by_class:
        if batch.y is None:
            raise FitError("this score needs labels")
        y = np.asarray(batch.y, np.int64)
        if y.size and (y.min() < 0 or y.max() >= len(sums.count)):
            raise FitError(f"a label lies outside 0..{len(sums.count) - 1}")
    else:
        y = np.zeros(len(phi), np.int64)
    total = sums.total.copy()
    np.add.at(total, y, phi)
    count = sums.count + np.bincount(y, minlength=len(sums.count))
    return replace(sums, count=count, total=total, outer=sums.outer + phi.T @ phi)


def join(a: ClassSums, b: ClassSums) -> ClassSums:
    """The sums of both sets of rows."""
    return ClassSums(a.count + b.count, a.total + b.total, a.outer + b.outer)


def shrunk_inverse(scatter: F64, n: float) -> tuple[F64, float]:
    """Inverse covariance with oracle-approximating shrinkage towards a multiple of the identity.

    ``scatter`` is the centred sum of outer products, D×D, of ``n`` rows. Chen, Wiesel, Eldar &
    Hero 2010, "Shrinkage algorithms for MMSE covariance estimation", eq. 23: needs only traces,
    so it folds. Returns the inverse and the shrinkage in (0, 1].
    """
    d = len(scatter)
    s = scatter / n
    trace, trace2 = float(np.trace(s)), float((s * s).sum())
    if trace <= 0:
        raise FitError("every feature is constant on the given rows")
    numerator = (1 - 2 / d) * trace2 + trace**2
    denominator = (n + 1 - 2 / d) * (trace2 - trace**2 / d)
    rho = 1.0 if denominator <= 0 else min(1.0, max(numerator / denominator, 1e-9))
    values, vectors = np.linalg.eigh(s)
    shrunk = (1 - rho) * np.maximum(values, 0.0) + rho * trace / d
    return (vectors / shrunk) @ vectors.T, rho
