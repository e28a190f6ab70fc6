"""Gaussian classes as they are: their counts and means, in the coordinates in which the pooled
covariance within classes is the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, I64, Array
from posthoc.methods.vbll.coordinates import Affine, affine_of, measure
from posthoc.rows import Rows

if TYPE_CHECKING:
    from posthoc.graph import Fragment

LEAST = 1e-3  # of a feature's variance counts as variance within classes, whatever the rows say


@dataclass(frozen=True, slots=True)
class Within:
    """``u = affine(phi) @ rotation`` with rotation D×D or None."""

    affine: Affine
    rotation: F64 | None

    def __call__(self, phi: Array) -> F64:
        """Rows N×D."""
        x = self.affine(phi)
        return x if self.rotation is None else x @ self.rotation

    def turned(self, weights: F64) -> F64:
        """Weights K×D of u as those of affine(phi), which a graph rounds once less."""
        return weights if self.rotation is None else weights @ self.rotation.T

    def emit_square(self, g: Fragment, x: str) -> str:
        """|u|², N×1, of x = affine(phi)."""
        u = x if self.rotation is None else g.op("MatMul", x, g.const(self.rotation))
        return g.sum(g.op("Mul", u, u), 1, keepdims=True)

    def tensors(self) -> dict[str, Array]:
        """For a state; `within_of` reads them."""
        more = {} if self.rotation is None else {"rotation": self.rotation}
        return self.affine.tensors() | more


def within_of(tensors: dict[str, Array]) -> Within:
    """The map that a state holds."""
    return Within(affine_of(tensors), tensors.get("rotation"))


@dataclass(frozen=True, slots=True)
class Measured:
    """The map to coordinates u; rows ``counts`` C of each class and their ``means`` C×D there, zero
    without rows; ``kept`` is the share of the rows' own correlation that shrinkage left."""

    within: Within
    counts: I64
    means: F64
    kept: float


def measure_classes(rows: Rows, classes: int, dense: bool) -> Measured:
    """Two passes. ``dense`` estimates the pooled within-class correlation, D² numbers, and shrinks
    it towards the identity by the oracle approximating shrinkage of Chen, Wiesel, Eldar & Hero
    2010, "Shrinkage algorithms for MMSE covariance estimation"; else only variances count.
    """
    affine = measure(rows)
    d = len(affine.centre)
    counts, sums = np.zeros(classes, np.int64), np.zeros((classes, d))
    outer = np.zeros((d, d)) if dense else np.zeros(d)
    for block in rows:
        if len(block) == 0:
            continue
        x = affine(np.asarray(block.phi))
        y = np.asarray(block.y, np.int64)
        counts += np.bincount(y, minlength=classes)
        np.add.at(sums, y, x)
        outer += x.T @ x if dense else (x**2).sum(0)
    n = int(counts.sum())
    means = sums / np.maximum(counts, 1)[:, None]
    between = (sums.T @ means) if dense else (sums * means).sum(0)
    pooled = (outer - between) / n
    total, inner = (np.diag(outer), np.diag(pooled)) if dense else (outer, pooled)
    # A feature that is constant stays in the units of the affine map.
    variance = np.where(total > 0, np.maximum(inner, 0.0) + LEAST * total / n, 1.0)
    inverse = (affine.inverse / np.sqrt(variance)).astype(np.float32).astype(np.float64)
    ratio = inverse / affine.inverse
    scaled = Affine(affine.centre, inverse)
    if not dense:
        return Measured(Within(scaled, None), counts, means * ratio, 0.0)
    pooled[np.diag_indices(d)] = variance
    correlation = pooled * np.multiply.outer(ratio, ratio)
    kept = 1.0 - _shrinkage(correlation, n - int((counts > 0).sum()))
    values, basis = np.linalg.eigh(kept * correlation + (1.0 - kept) * np.eye(d))
    rotation = basis / np.sqrt(values)
    return Measured(Within(scaled, rotation), counts, (means * ratio) @ rotation, kept)


def _shrinkage(correlation: F64, n: int) -> float:
    """The share of the identity that is best for n degrees of freedom."""
    p = len(correlation)
    square = float((correlation**2).sum())
    above = (1.0 - 2.0 / p) * square + p**2
    below = (n + 1.0 - 2.0 / p) * (square - p)
    return 1.0 if below <= 0 else min(1.0, above / below)
