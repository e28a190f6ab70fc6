"""The sums over rows that the curvatures consist of: float32 blocks, added up in float64.

Differences like ``1 - p`` lose every digit where the model is sure, and float32 loses them soon:
they are written as sums of the other classes' probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, LinearHead
from posthoc.folds import class_index
from posthoc.rows import BLOCK, take


@dataclass(frozen=True, slots=True)
class Errors:
    """Of a regression: the sum of squared residuals of each output (K) over ``n`` labelled rows."""

    squared: F64
    n: int

    def add(self, other: Errors) -> Errors:
        """Of both sets of rows."""
        return Errors(self.squared + other.squared, self.n + other.n)


def errors(batch: Features) -> Errors:
    """Of a batch; FitError for labels of another shape than the outputs, or not finite."""
    z = np.asarray(batch.z, np.float64)
    if batch.y is None:
        return Errors(np.zeros(z.shape[1]), 0)
    y = np.asarray(batch.y, np.float64)
    if y.shape != z.shape:
        raise FitError(f"labels of shape {y.shape} for outputs {z.shape}")
    if not np.isfinite(y).all():
        raise FitError("labels that are not finite; drop their rows")
    return Errors(((y - z) ** 2).sum(0), len(batch))


def blocks(batch: Features, size: int = BLOCK) -> Iterator[Features]:
    """The batch in parts of at most ``size`` rows: float32 sums stay short."""
    for i in range(0, len(batch), size):
        yield take(batch, slice(i, i + size))


def real(x: Array | None) -> Array:
    """float32 and float64 as they are, anything else as float32: a float16 Gram matrix overflows at
    a few hundred features."""
    assert x is not None
    x = np.asarray(x)
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)


def probabilities(z: Array) -> Array:
    """Softmax over classes (N×C), in the precision of z."""
    z = real(z)
    p: Array = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return p


def bernoulli(z: Array) -> Array:
    """``p (1 - p)`` of each class, N×C."""
    p = probabilities(z)
    index = np.arange(len(p)), p.argmax(1)
    rest = 1 - p
    others = p.copy()
    others[index] = 0
    rest[index] = others.sum(1)
    return np.asarray(p * rest)


def gradients(batch: Features) -> Array:
    """``p - e_y``, N×C, of which the empirical Fisher matrix consists; FitError without labels."""
    if batch.y is None:
        raise FitError("fisher=empirical needs labels: name their column with --target, or use ggn")
    g = probabilities(batch.z)
    index = np.arange(len(g)), class_index(batch.y, g.shape[1])
    g[index] = 0
    g[index] = -g.sum(1)
    return g


def gram(phi: Array) -> F64:
    """Sum of phi~ phi~' (K×K, K = D + 1) over rows N×D, where phi~ has a 1 appended.

    The rows are centred first and their mean is put back in float64: in float32 the products of
    features far from zero keep nothing of how these vary.
    """
    n, d = phi.shape
    out = np.zeros((d + 1, d + 1))
    if n == 0:
        return out
    centre = np.append(phi.mean(0), phi.dtype.type(1))
    away = phi - centre[:d]
    out[:d, :d] = away.T @ away
    centre = centre.astype(np.float64)
    # Of the rounded mean: what is left of the sum goes once with it, and the mean n times.
    left = np.append(away.sum(0, dtype=np.float64), 0.0) + (0.5 * n) * centre
    crossed = np.multiply.outer(centre, left)
    out += crossed
    out += crossed.T
    return out


def centre(total: F64, n: int) -> F64:
    """The mean D of features with this sum over n rows, in numbers that float32 holds exactly: a
    graph that subtracts it subtracts what the definition subtracts, and what it projects is small
    however far the features lie from zero."""
    return np.asarray((total / n).astype(np.float32), np.float64)


def softmax_curvature(p: Array) -> F64:
    """Sum of ``diag(p) - p p'`` (C×C) over rows N×C."""
    pairs = (p.T @ p).astype(np.float64)
    np.fill_diagonal(pairs, 0.0)
    return np.diag(pairs.sum(1)) - pairs


def centred_basis(classes: int) -> F64:
    """Orthonormal (C-1)×C rows orthogonal to (1, …, 1): Helmert's contrasts."""
    i = np.arange(1, classes)
    basis = np.tril(np.ones((classes - 1, classes)))
    basis[i - 1, i] = -i
    return basis / np.sqrt(i * (i + 1.0))[:, None]


def append_one(phi: Array) -> Array:
    """phi~ = [phi, 1], N×K."""
    return np.concatenate([phi, np.ones((len(phi), 1), phi.dtype)], 1)


def exact(phi: Array) -> F64:
    """phi~ in float64."""
    return append_one(np.asarray(phi, np.float64))


def squared_norm(head: LinearHead, centred: bool) -> float:
    """|theta|² of weights and biases, ``centred`` to mean zero over classes: softmax ignores it."""
    theta = np.concatenate([head.weight, head.bias[:, None]], 1)
    return float(((theta - theta.mean(0) if centred else theta) ** 2).sum())
