"""Squared error against predicted variance, in bins of equal count, in one pass over any maps.

Bins of equal count need all variances at once. Here every variance falls into one of the 2^16
float32 buckets that share their upper half (`quantile.sortable_bits`), 0.8 % wide, and whole
neighbouring buckets are put together at the end: the edges are exact to that.
"""

from __future__ import annotations

import numpy as np

from calibration.evaluation.records import VarianceBins
from calibration.metrics.dense import known_pixels
from calibration.metrics.totals import N_BINS
from calibration.metrics.uce import VarianceTotals
from calibration.quantile import from_sortable_bits, sortable_bits
from posthoc.contract import Array, DataError

_BUCKETS = 1 << 16


class VarianceSums:
    """Counts, squared errors and variances by bucket: 1.5 MB."""

    def __init__(self) -> None:
        self.count = np.zeros(_BUCKETS, np.int64)
        self.squared_error = np.zeros(_BUCKETS)
        self.variance = np.zeros(_BUCKETS)

    def add(self, squared_error: Array, variance: Array) -> None:
        """Maps of one shape, NaN in ``squared_error`` where there is no truth; DataError for a
        number below 0 or infinite."""
        error, claimed = known_pixels(squared_error, variance, ("squared_error", "variance"))
        if (error < 0).any() or (claimed < 0).any():
            raise DataError("a squared error or a variance lies below 0")
        bucket = sortable_bits(claimed.astype(np.float32)) >> 16
        self.count += np.bincount(bucket, minlength=_BUCKETS)
        self.squared_error += np.bincount(bucket, error, _BUCKETS)
        self.variance += np.bincount(bucket, claimed, _BUCKETS)

    def totals(self, bins: int = N_BINS) -> VarianceTotals:
        """The sums in at most ``bins`` bins of about equal count, empty ones left out."""
        filled = np.flatnonzero(self.count)
        below = np.cumsum(self.count[filled]) - self.count[filled]
        # A bucket goes where its first pixel belongs.
        place = below * bins // max(int(self.count.sum()), 1)
        starts = np.flatnonzero(np.diff(place, prepend=-1))
        if not len(filled):
            raise DataError("a calibration curve needs at least one pixel")
        ends = filled[np.append(starts[1:], len(filled)) - 1]
        upper = from_sortable_bits((ends.astype(np.uint32) << 16) | 0xFFFF).astype(np.float64)
        return VarianceTotals(
            upper[:-1],
            np.add.reduceat(self.count[filled], starts),
            np.add.reduceat(self.squared_error[filled], starts),
            np.add.reduceat(self.variance[filled], starts),
        )

    @property
    def uce(self) -> float:
        """Uncertainty calibration error over these bins, in squared units."""
        return self.totals().uce

    def record(self, name: str) -> VarianceBins:
        """The calibration curve; the last bin's upper edge is that of its largest bucket."""
        t = self.totals()
        top = np.flatnonzero(self.count)[-1:].astype(np.uint32)
        last = from_sortable_bits((top << 16) | 0xFFFF).astype(np.float64)
        return VarianceBins(
            name=name,
            upper=tuple(np.append(t.edges, last).tolist()),
            count=tuple(t.count.tolist()),
            variance=tuple(t.mean_variance.tolist()),
            squared_error=tuple(t.mean_squared_error.tolist()),
        )
