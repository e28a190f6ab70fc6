"""The smallest probability that a family works with."""

from __future__ import annotations

import numpy as np

from posthoc.contract import F64, Array

LEAST = -80.0  # of log p, which float32 holds: exp(-80) = 2e-35


def bounded(log_p: Array) -> F64:
    """Log-probabilities no smaller than LEAST: a probability of 0 has no logarithm."""
    return np.maximum(np.asarray(log_p, np.float64), LEAST)
