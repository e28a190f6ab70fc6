"""Split-conformal intervals and quantiles of a regression, on normalised residuals.

Interval: mean ± q std with q the conformal rank of max_k |y_k - mean_k| / std_k, so that several
outputs are covered jointly (Lei et al. 2018; Diquigiovanni et al. 2022 for the maximum). Quantile:
mean + std r where r is a conformal rank of the signed residuals, which is quantile recalibration
as split conformal on the distribution function (Dheur & Ben Taieb 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posthoc.contract import F64, Array

QUANTILE_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def residual_scores(y: Array, mean: Array, std: Array) -> F64:
    """Interval scores N from targets, means and standard deviations N×K."""
    return np.asarray(np.abs(signed_residuals(y, mean, std)).max(1))


def signed_residuals(y: Array, mean: Array, std: Array) -> F64:
    """``(y - mean) / std``, N×K, in float64."""
    return (np.asarray(y, np.float64) - np.asarray(mean, np.float64)) / np.asarray(std, np.float64)


def quantile_factors(signed: Array, levels: Sequence[float] = QUANTILE_LEVELS) -> F64:
    """K×Q factors r of ``mean + std r``: order statistics at rank ceil((n+1) level), at most n."""
    s = np.sort(np.asarray(signed, np.float64), axis=0)
    n = len(s)
    ranks = [min(n, int(np.ceil(round((n + 1) * q, 9)))) for q in levels]
    return np.asarray(s[[r - 1 for r in ranks]].T)
