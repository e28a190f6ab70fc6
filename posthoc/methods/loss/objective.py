"""What a loss predictor is trained for: values and gradients by its output, in numpy.

Each function gives (a mean over rows or pairs, its gradient by the output N×K).
"""

from __future__ import annotations

import numpy as np

from posthoc.contract import F64, Array
from posthoc.folds import log_softmax

MOST = 1.0  # nats, or mean squared errors: losses further apart count like this


def ranking(u: Array, loss: Array, gap: float) -> tuple[float, F64]:
    """Mean over pairs of rows of max(0, gap - sign(l_i - l_j) (u_i - u_j)), for losses N×K.

    Kirchhof et al. 2024, arXiv:2402.16569. A pair counts by |l_i - l_j|, at most `MOST`: most
    pairs are two rows that the model has right, and which of them has the loss of 1e-4 and which
    1e-5 says little. Equal losses do not count.
    """
    u, loss = np.asarray(u, np.float64), np.asarray(loss, np.float64)
    apart = loss[:, None] - loss[None]
    weight = np.minimum(np.abs(apart), MOST)
    total = float(weight.sum())
    if total == 0.0:
        return 0.0, np.zeros_like(u)
    sign = np.sign(apart)
    short = gap - sign * (u[:, None] - u[None])
    active = weight * (short > 0)
    # (i, j) and (j, i) are the same pair, so that both fall to i.
    gradient = -2.0 * (active * sign).sum(1) / total
    return float((active * short).sum() / total), gradient


def widened(h: Array, z: Array, y: Array) -> tuple[float, F64]:
    """Mean negative log-likelihood in nats of classes y N under softmax(z exp(-h / 2)), for h N×1:
    h is the logarithm of the squared temperature of a row."""
    h, z = np.asarray(h, np.float64), np.asarray(z, np.float64)
    scaled = (z - z.mean(1, keepdims=True)) * np.exp(-h / 2)
    log_p, row = log_softmax(scaled), np.arange(len(z))
    expected = (np.exp(log_p) * scaled).sum(1)
    gradient = -0.5 * (expected - scaled[row, y]) / len(z)
    return float(-log_p[row, y].mean()), gradient[:, None]


def gaussian(h: Array, squared: Array) -> tuple[float, F64]:
    """Mean negative log-likelihood in nats, less log(2 pi) / 2, of errors with squares N×K under
    the variances exp(h)."""
    h, squared = np.asarray(h, np.float64), np.asarray(squared, np.float64)
    ratio = squared * np.exp(-h)
    return float(0.5 * (h + ratio).mean()), 0.5 * (1 - ratio) / h.size
