"""How far two histograms are apart, beside what chance shows between samples of their sizes.

Kolmogorov-Smirnov: the largest gap between the two distribution functions, at edges of bins.
PSI (population stability index): sum of (p - q) ln(p/q) over bins, the symmetric Kullback-Leibler
divergence of Jeffreys 1946. Both are sizes of an effect, which p-values are not: with enough rows
any difference is significant.

p-values. KS: Kolmogorov's limit law for the samples behind the bins. The gap at edges is at most
that between the samples, so the p-value is at least theirs: valid, and conservative the coarser the
bins are. PSI: under the null PSI / (1/n + 1/m) is chi-squared with bins - 1 degrees of freedom for
large counts (Yurdakul & Naranjo 2020, "Statistical properties of the population stability index",
J. Risk Model Validation 14). Rows count as independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, Array, DataError

LEVEL = 0.99  # that the floors are quantiles of


@dataclass(frozen=True, slots=True)
class Distance:
    """``ks`` in 0…1 and ``psi`` in nats, at least 0; ``ks_floor`` and ``psi_floor`` are what equal
    distributions stay below with probability ``LEVEL``; the p-values are of equal distributions.
    """

    ks: float
    psi: float
    ks_pvalue: float
    psi_pvalue: float
    ks_floor: float
    psi_floor: float


def distance(reference: Array, counts: Array) -> Distance:
    """Distance of two histograms over the same B bins in ascending order, of counts, not cumulated.

    Counts need not be whole: those of ``increase()`` are not. For PSI half a row is added to each
    bin that is not empty in both, so that none is infinite. Raises DataError for shapes that do not
    match, a count that is negative or not finite, and a histogram without rows.
    """
    from scipy.special import chdtrc, chdtri, kolmogi, kolmogorov  # here: a server needs no scipy

    a, b = _counts(reference, "reference"), _counts(counts, "stream")
    if a.shape != b.shape:
        raise DataError(f"histograms of {len(a)} and {len(b)} bins cannot be compared")
    n, m = float(a.sum()), float(b.sum())
    gap = float(np.abs(np.cumsum(a) / n - np.cumsum(b) / m).max())
    filled = (a > 0) | (b > 0)
    p, q = a[filled] + 0.5, b[filled] + 0.5
    p, q = p / p.sum(), q / q.sum()
    psi = float(((p - q) * np.log(p / q)).sum())
    noise, freedom = 1 / n + 1 / m, len(p) - 1
    return Distance(
        ks=gap,
        psi=psi,
        ks_pvalue=float(kolmogorov(gap / math.sqrt(noise))),
        psi_pvalue=float(chdtrc(freedom, psi / noise)) if freedom else 1.0,
        ks_floor=min(1.0, float(kolmogi(1 - LEVEL)) * math.sqrt(noise)),
        psi_floor=float(chdtri(freedom, 1 - LEVEL)) * noise if freedom else 0.0,
    )


def _counts(x: Array, whose: str) -> F64:
    found = np.asarray(x, np.float64)
    if found.ndim != 1 or not (np.isfinite(found).all() and (found >= 0).all()):
        raise DataError(f"the {whose} histogram holds a count that is negative or no number")
    if not found.sum() > 0:
        raise DataError(f"the {whose} histogram has no rows")
    return found
