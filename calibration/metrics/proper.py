"""Proper scores per row: Brier, and CRPS and log loss of a Gaussian. Numpy only.

A proper score is lowest, in expectation, for the true distribution (Gneiting & Raftery 2007,
"Strictly proper scoring rules, prediction, and estimation"). The log loss of classes is
``posthoc.folds.log_loss_of_probs``.
"""

from __future__ import annotations

import math

import numpy as np

from posthoc.contract import F64, Array
from posthoc.folds import PROBABILITY_FLOOR, class_index


def brier_score(probs: Array, y: Array) -> F64:
    """``sum_c (p_c - 1[y=c])^2`` per row, in 0…2, for ``probs`` (N×C) and classes ``y`` (N).

    Brier 1950, "Verification of forecasts expressed in terms of probability".
    """
    p = np.array(probs, dtype=np.float64)
    p[np.arange(len(p)), class_index(y, p.shape[1])] -= 1.0
    score: F64 = np.einsum("nc,nc->n", p, p)
    return score


def gaussian_crps(error: Array, std: Array) -> F64:
    """CRPS of N(0, std²) at ``error``, elementwise, in the target's units.

    Gneiting & Raftery 2007, eq. 21 with the sign turned, so that lower is better. A ``std`` of
    zero counts as the smallest normal float32, and the score becomes the absolute error.
    """
    sigma = _positive(std)
    w = np.asarray(error, dtype=np.float64) / sigma
    density = np.exp(-0.5 * w**2) / math.sqrt(2 * math.pi)
    crps: F64 = sigma * (w * _erf(w / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))
    return crps


def gaussian_log_loss(error: Array, std: Array) -> F64:
    """``-log N(error; 0, std²)``, elementwise, in nats; ``std`` as in ``gaussian_crps``."""
    sigma = _positive(std)
    w = np.asarray(error, dtype=np.float64) / sigma
    loss: F64 = 0.5 * w**2 + np.log(sigma) + 0.5 * math.log(2 * math.pi)
    return loss


def _positive(std: Array) -> F64:
    sigma: F64 = np.maximum(np.asarray(std, dtype=np.float64), PROBABILITY_FLOOR)
    return sigma


def _erf(x: F64) -> F64:
    # numpy has no erf, and the ledger's joiner, which runs this, needs nothing else of scipy.
    return np.fromiter(map(math.erf, x.ravel()), dtype=np.float64, count=x.size).reshape(x.shape)
