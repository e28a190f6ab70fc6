"""Coordinates in which the members' losses are about equally curved every way.

Near their minima the Hessian of the log loss is about A ⊗ U, A the sum over rows of
g phi~ phi~' with g = tr(diag(p) - p p'), U the sum of diag(p) - p p' over the sum of g: the
Kronecker-factored Gauss-Newton matrix with each row counted by its own curvature. In both
eigenbases, divided by the root of eigenvalues' product plus prior precision, the whole Hessian is
about the identity; measured at the head that all rows together give, because at the frozen head
rows may be far from fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, Array, FitError, LinearHead
from posthoc.methods.heads.blocks import blocks
from posthoc.methods.heads.losses import normalise
from posthoc.rows import Rows

BOUNDS = (1e-8, 1e12)
MAX_STEPS = 1_000


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
    """X = features (U ∘ scale) classes', for eigenvectors of both factors (D+1)×(D+1), C×C."""

    features: Array
    classes: Array
    scale: Array

    def forward(self, u: Array) -> Array:
        """S×P to S×P."""
        heads = u.reshape(len(u), *self.scale.shape) * self.scale
        return (self.features @ (heads @ self.classes.T)).reshape(u.shape)

    def gradient(self, g: Array) -> Array:
        """S×P to S×P."""
        slopes = g.reshape(len(g), *self.scale.shape)
        return ((self.features.T @ (slopes @ self.classes)) * self.scale).reshape(g.shape)


def around(rows: Rows, x: Array, classes: int, precision: float, mass: float) -> Kronecker:
    """Coordinates for heads near ``x`` ((D+1)·C numbers beside the frozen head), where rows have
    the mean weight ``mass``."""
    head = x.reshape(-1, classes)
    outer, curved, total = np.zeros((len(head), len(head))), np.zeros((classes, classes)), 0.0
    for block in blocks(rows, x.dtype):
        p = (block.phi @ head + block.z)[:, None]
        normalise(p)
        p = p[:, 0]
        own = 1.0 - (p * p).sum(1)
        outer += block.phi.T @ (block.phi * own[:, None])
        curved += np.diag(p.sum(0)) - p.T @ p
        total += float(own.sum())
    mu, q = np.linalg.eigh(outer)
    lam, v = np.linalg.eigh(curved / max(total, np.finfo(np.float64).tiny))
    product = np.multiply.outer(np.maximum(mu, 0.0), np.maximum(lam, 0.0))
    scale = 1.0 / np.sqrt(mass * product + precision)
    return Kronecker(q.astype(x.dtype), v.astype(x.dtype), scale.astype(x.dtype))


def evidence(rows: Rows, head: LinearHead) -> float:
    """The prior precision that maximises the Laplace evidence of the frozen head on these rows,
    by MacKay's fixed point d = gamma / |theta|², with the Kronecker curvature."""
    theta = np.concatenate([head.weight, head.bias[:, None]], 1)
    norm = float(((theta - theta.mean(0)) ** 2).sum())
    if norm == 0.0:
        raise FitError("the head's weights are all equal; it predicts nothing")
    c, d = theta.shape
    outer, curved, n = np.zeros((d, d)), np.zeros((c, c)), 0
    for block in blocks(rows, np.dtype(np.float64)):
        p = block.z[:, None].copy()
        normalise(p)
        p = p[:, 0]
        outer += block.phi.T @ block.phi
        curved += np.diag(p.sum(0)) - p.T @ p
        n += len(block)
    mu = np.maximum(np.linalg.eigvalsh(outer), 0.0)
    lam = np.maximum(np.linalg.eigvalsh(curved / n), 0.0)
    return fixed_point(np.multiply.outer(mu, lam), norm)


def fixed_point(curvature: F64, norm: float) -> float:
    """MacKay's d = gamma / norm, gamma = sum of h / (h + d)."""
    precision = 1.0
    for _ in range(MAX_STEPS):
        new = float(np.clip((curvature / (curvature + precision)).sum() / norm, *BOUNDS))
        if abs(new - precision) <= 1e-8 * precision:
            return new
        precision = new
    return precision
