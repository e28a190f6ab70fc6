"""Gaussian statistics of features by class, shared by the Mahalanobis scores. All sums: a fold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from posthoc.contract import F64, Features, FitError

ROUNDING = 1e-13  # a sum of squares in float64 knows itself to about this share


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


def real(batch: Features, name: str = "this score") -> F64:
    """The features of a batch, N×D, in float64.

    Raises FitError, naming the score, for a black box and for features that are not finite.
    """
    if batch.phi is None:
        raise FitError(f"{name} needs features; the model is a black box")
    phi = np.asarray(batch.phi, np.float64)
    if not np.isfinite(phi).all():
        raise FitError(f"{name} met features that are not finite; leave out or mend those rows")
    return phi


def exact(mean: F64) -> F64:
    """The mean D in numbers that float32 holds: a graph that subtracts it subtracts what the
    definition subtracts, however far the features lie from zero."""
    return np.asarray(np.asarray(mean, np.float32), np.float64)


def add(sums: ClassSums, batch: Features, *, by_class: bool, name: str = "this score") -> ClassSums:
    """Add a batch; with ``by_class`` its labels choose the class, else all rows are one class."""
    phi = real(batch, name)
    if by_class:
        if batch.y is None:
            raise FitError(f"{name} needs labels")
        y = np.asarray(batch.y, np.int64)
        if y.size and (y.min() < 0 or y.max() >= len(sums.count)):
            raise FitError(f"{name}: a label lies outside 0..{len(sums.count) - 1}")
    else:
        y = np.zeros(len(phi), np.int64)
    total = sums.total.copy()
    np.add.at(total, y, phi)
    count = sums.count + np.bincount(y, minlength=len(sums.count))
    return replace(sums, count=count, total=total, outer=sums.outer + phi.T @ phi)


def join(a: ClassSums, b: ClassSums) -> ClassSums:
    """The sums of both sets of rows."""
    return ClassSums(a.count + b.count, a.total + b.total, a.outer + b.outer)


def shrunk_inverse(
    scatter: F64, n: float, *, size: float = 0.0, name: str = "this score", within: str = ""
) -> tuple[F64, float]:
    """Inverse covariance with oracle-approximating shrinkage towards a multiple of the identity.

    ``scatter`` is the centred sum of outer products, D×D, of ``n`` rows. Chen, Wiesel, Eldar &
    Hero 2010, "Shrinkage algorithms for MMSE covariance estimation", eq. 23: needs only traces,
    so it folds. Returns the inverse and the shrinkage in (0, 1].

    Raises FitError, naming the score, for features that are constant (``within`` says where):
    whose scatter is no more than rounding beside ``size``, the sum of their squares.
    """
    d = len(scatter)
    s = scatter / n
    trace, trace2 = float(np.trace(s)), float((s * s).sum())
    if trace <= ROUNDING * size / n:
        raise FitError(
            f"{name}: every feature is constant{within} on the given rows; give more rows, or a "
            "score of outputs"
        )
    numerator = (1 - 2 / d) * trace2 + trace**2
    denominator = (n + 1 - 2 / d) * (trace2 - trace**2 / d)
    rho = 1.0 if denominator <= 0 else min(1.0, max(numerator / denominator, 1e-9))
    values, vectors = np.linalg.eigh(s)
    shrunk = (1 - rho) * np.maximum(values, 0.0) + rho * trace / d
    return (vectors / shrunk) @ vectors.T, rho
