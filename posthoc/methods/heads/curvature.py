"""Coordinates in which the members' losses are about equally curved every way, and the evidence.

The Hessian of the log loss is about A ⊗ U with A the sum over rows of g phi~ phi~', U the sum of
diag(p) - p p' over the sum of g, and g = tr(diag(p) - p p'): the Kronecker-factored Gauss-Newton
matrix (Ritter et al. 2018) with every row counted by its own curvature. In the eigenbases of both
factors, divided by the root of (product of eigenvalues + prior precision), it is about the
identity. It is measured at the head that all rows together give, because at the frozen one the
rows may be far from fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from posthoc.contract import F64, Array, LinearHead
from posthoc.methods.heads.blocks import blocks
from posthoc.methods.heads.losses import centred, normalise
from posthoc.methods.laplace.prior import Spectrum, by_evidence
from posthoc.rows import Rows


@dataclass(frozen=True, slots=True)
class Plain:
    """The weights as they are."""

    def forward(self, u: Array) -> Array:
        """Unchanged."""
        return u

    def gradient(self, g: Array) -> Array:
        """Unchanged."""
        return g


@dataclass(frozen=True, slots=True)
class Kronecker:
    """X = features (U ∘ scale) classes', with the eigenvectors (D+1)×(D+1) and C×C."""

    features: Array
    classes: Array
    scale: Array

    def forward(self, u: Array) -> Array:
        """S×P to S×P."""
        heads = u.reshape(len(u), *self.scale.shape) * self.scale
        return np.reshape(self.features @ (heads @ self.classes.T), u.shape)

    def gradient(self, g: Array) -> Array:
        """S×P to S×P."""
        slopes = g.reshape(len(g), *self.scale.shape)
        turned = self.features.T @ (slopes @ self.classes)
        return np.reshape(turned * self.scale, g.shape)


def around(rows: Rows, x: Array, classes: int, precision: float, mass: float) -> Kronecker:
    """Coordinates for heads near ``x``, (D+1)·C numbers; ``mass`` is the mean weight of a row."""
    outer, curved, total = _factors(rows, x.reshape(-1, classes), weighted=True)
    mu, q = np.linalg.eigh(outer)
    lam, v = np.linalg.eigh(curved / max(total, np.finfo(np.float64).tiny))
    product = np.multiply.outer(np.maximum(mu, 0.0), np.maximum(lam, 0.0))
    scale = 1.0 / np.sqrt(mass * product + precision)
    return Kronecker(q.astype(x.dtype), v.astype(x.dtype), scale.astype(x.dtype))


def evidence(rows: Rows, head: LinearHead, dtype: np.dtype[Any]) -> float:
    """The prior precision at which the Laplace evidence of the frozen head on these rows is
    largest, with the curvature A ⊗ U where every row counts alike. FitError as of
    `posthoc.methods.laplace.prior.by_evidence`."""
    frozen = np.zeros((head.weight.shape[1] + 1, len(head.bias)), dtype)
    outer, curved, n = _factors(rows, frozen, weighted=False)
    mu = np.maximum(np.linalg.eigvalsh(outer), 0.0)
    lam = np.maximum(np.linalg.eigvalsh(curved / n), 0.0)
    return by_evidence(Spectrum(np.multiply.outer(mu, lam), _centred_norm(head)))[0]


def _centred_norm(head: LinearHead) -> float:
    """The squared norm of weights and biases less their means over classes."""
    theta = np.concatenate([head.weight, head.bias[:, None]], 1)
    return float(((theta - theta.mean(0)) ** 2).sum())


def _factors(rows: Rows, head: Array, *, weighted: bool) -> tuple[F64, F64, float]:
    """Sums over rows at the frozen head plus ``head`` (D+1)×C: of g phi~ phi~', of diag(p) - p p'
    and of g; g = 1 unless weighted."""
    d, c = head.shape
    outer, curved, total = np.zeros((d, d)), np.zeros((c, c)), 0.0
    for block in blocks(rows, head.dtype):
        p = block.phi @ head + centred(block.z).astype(head.dtype)
        normalise(p)
        own = 1.0 - (p * p).sum(1) if weighted else np.ones(len(p), p.dtype)
        outer += block.phi.T @ (block.phi * own[:, None])
        curved += np.diag(p.sum(0)) - p.T @ p
        total += float(own.sum())
    return outer, curved, total
