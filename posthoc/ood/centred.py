"""Features around their mean and how far they lie from it: what fDBD and NCI share. A fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, LinearHead
from posthoc.ood.gaussian import ROUNDING, exact, real

if TYPE_CHECKING:
    from posthoc.graph import Fragment

# A row nearer to the mean than this share of the usual distance counts as that near: at the mean
# itself there is no direction to speak of.
NEAREST = 1e-3


@dataclass(frozen=True, slots=True)
class Moments:
    """``n`` rows, ``total`` D the sum of features, ``square`` the sum of their squares."""

    n: int
    total: F64
    square: float


def empty(n_features: int) -> Moments:
    """No rows."""
    return Moments(0, np.zeros(n_features), 0.0)


def add(stats: Moments, batch: Features, name: str) -> Moments:
    """Add the features of a batch; FitError for a black box and features that are not finite."""
    phi = real(batch, name)
    square = float((phi * phi).sum())
    return Moments(stats.n + len(phi), stats.total + phi.sum(0), stats.square + square)


def join(a: Moments, b: Moments) -> Moments:
    """The sums of both sets of rows."""
    return Moments(a.n + b.n, a.total + b.total, a.square + b.square)


def centre(stats: Moments, name: str) -> tuple[F64, float]:
    """The mean D, in numbers that float32 holds, and the root mean square distance from it.

    Raises FitError, naming the score, for no rows and for constant features.
    """
    if stats.n == 0:
        raise FitError(f"{name} was given no rows")
    mean = stats.total / stats.n
    spread = stats.square - stats.n * float(mean @ mean)
    if spread <= ROUNDING * stats.square:
        raise FitError(
            f"{name}: every feature is constant on the given rows; give more rows, or a score of "
            "outputs"
        )
    return exact(mean), float(np.sqrt(spread / stats.n))


def head_of(head: LinearHead | None, name: str) -> LinearHead:
    """The head; FitError, naming the score, where there is none or it has but one output."""
    if head is None:
        raise FitError(f"{name} needs a linear head and this model is a black box")
    if len(head.bias) < 2:
        raise FitError(f"{name} needs a head of at least two classes and this one has 1")
    return head


def distance(phi: Array | None, mean: Array, least: float) -> F64:
    """|phi - mean| of N rows, ``least`` where they lie nearer (float64 definition)."""
    psi = np.asarray(phi, np.float64) - mean
    return np.asarray(np.maximum(np.sqrt((psi * psi).sum(1)), least))


def emit_distance(g: Fragment, phi: str | None, mean: Array, least: float) -> str:
    """The same as a graph fragment."""
    assert phi is not None
    psi = g.op("Sub", phi, g.const(mean))
    return g.op("Max", g.op("Sqrt", g.sum(g.op("Mul", psi, psi), 1)), g.const(least))
