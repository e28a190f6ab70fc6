"""The temperature of logits: on calibration rows, or on rows that a page held out in its fit."""

from __future__ import annotations

import math

import numpy as np

from posthoc.contract import Array
from posthoc.folds import log_softmax

LOG_T = (-6.0, 8.0)  # logits of a Gaussian head are wrong by orders of magnitude
SMOOTHING = 0.1  # rows
_CLOSE = 1e-8  # of log T
_STEPS = 100


def fit_temperature(z: Array, y: Array, start: float = 1.0) -> float:
    """T > 0 that maximises the likelihood of classes y N under softmax(z / T), z N×C.

    The likelihood is concave in 1 / T: the root of its derivative in log T by Newton's method,
    which bisects LOG_T where a step would leave what is left of it (Guo et al. 2017,
    arXiv:1706.04599). The labels are smoothed by a tenth of a row that names every class alike, so
    that rows without an error do not make T zero. ``start`` is a guess.
    """
    z = np.asarray(z, np.float64)
    z = z - z.mean(1, keepdims=True)
    n = len(z)
    true = float(z[np.arange(n), np.asarray(y)].sum()) / (n + SMOOTHING)
    lo, hi = LOG_T
    at = min(max(math.log(start), lo), hi)
    for _ in range(_STEPS):
        p = np.exp(log_softmax(z * math.exp(-at)))
        weighted = p * z
        first = weighted.sum(1)
        slope = float(first.mean()) - true  # above zero: too sharp, so T must rise
        lo, hi = (at, hi) if slope > 0 else (lo, at)
        variance = float((np.einsum("nc,nc->n", weighted, z) - first**2).mean())
        fall = variance * math.exp(-at)
        new = at + slope / fall if fall > 0 else math.inf
        if not lo < new < hi:
            new = (lo + hi) / 2
        if abs(new - at) < _CLOSE:
            return math.exp(new)
        at = new
    return math.exp(at)
