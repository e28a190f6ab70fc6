"""The temperature of logits on rows that a page held out, where it needs one inside its fit."""

from __future__ import annotations

import numpy as np

from posthoc.contract import Array
from posthoc.folds import log_softmax

LOG_T = (-6.0, 8.0)  # logits of a Gaussian head are wrong by orders of magnitude
STEPS = 50
SMOOTHING = 0.1  # rows


def fit_temperature(z: Array, y: Array) -> float:
    """T > 0 that maximises the likelihood of classes y N under softmax(z / T), z N×C.

    The likelihood is concave in 1 / T: bisection on its derivative (Guo et al. 2017,
    arXiv:1706.04599). The labels are smoothed by a tenth of a row that names every class alike, so
    that rows without an error do not make T zero.
    """
    z = np.asarray(z, np.float64)
    z = z - z.mean(1, keepdims=True)
    n = len(z)
    true = z[np.arange(n), np.asarray(y)].sum() / (n + SMOOTHING)
    lo, hi = LOG_T
    for _ in range(STEPS):
        mid = (lo + hi) / 2
        p = np.exp(log_softmax(z * np.exp(-mid)))
        lo, hi = (mid, hi) if (p * z).sum() / n > true else (lo, mid)
    return float(np.exp((lo + hi) / 2))
