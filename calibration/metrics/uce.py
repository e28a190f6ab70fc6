"""UCE and ENCE: is the mean squared error where σ² is claimed really σ²?

Laves, Ihler, Fast, Kahrs & Ortmaier 2020, "Well-calibrated regression uncertainty in medical
imaging with deep learning", MIDL, eq. 9. A constant variance equal to the mean squared error has
UCE and ENCE 0, so neither figure says anything about which pixels are uncertain: read them beside
the AUSE (``sparsification``) or the correlation (``correlation``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.metrics.dense import known_pixels
from calibration.metrics.totals import N_BINS
from posthoc.contract import F64, I64, Array, DataError
from posthoc.folds import Fold


@dataclass(frozen=True, slots=True)
class VarianceTotals:
    """Sums over pixels by bin of predicted variance; bin b holds ``edges[b-1] < σ² <= edges[b]``.

    ``edges`` (B-1, ascending) lie between the B bins; the outer bins are open.
    """

    edges: F64
    count: I64
    squared_error_sum: F64
    variance_sum: F64

    @property
    def n(self) -> int:
        """Pixels seen."""
        return int(self.count.sum())

    @property
    def uce(self) -> float:
        """``sum_b |squared_error_sum_b - variance_sum_b| / n`` in squared units; nan for none."""
        gaps = np.abs(self.squared_error_sum - self.variance_sum)
        return float(gaps.sum()) / self.n if self.n else math.nan

    @property
    def ence(self) -> float:
        """Expected normalised calibration error: mean over filled bins of ``|RMV - RMSE| / RMV``,
        RMV being the root of the mean variance (Levi, Gispan, Giladi & Fetaya 2022, "Evaluating
        and calibrating uncertainty prediction in regression tasks", eq. 9), who take bins of equal
        count. No unit. Plug-in: a perfect Gaussian shows about ``sqrt(1/(pi n_b))``. inf where a
        bin claims no variance and errs, nan for no pixels.
        """
        filled = self.count > 0
        if not filled.any():
            return math.nan
        error, claimed = np.sqrt(self.squared_error_sum[filled]), np.sqrt(self.variance_sum[filled])
        gap = np.abs(claimed - error)
        sure = np.where(gap > 0, np.inf, 0.0)
        return float(np.divide(gap, claimed, out=sure, where=claimed > 0).mean())

    @property
    def mean_squared_error(self) -> F64:
        """Of each bin, B; nan where a bin is empty."""
        return self._per_pixel(self.squared_error_sum)

    @property
    def mean_variance(self) -> F64:
        """Of each bin, B; nan where a bin is empty. The diagonal of the diagram is equality."""
        return self._per_pixel(self.variance_sum)

    def _per_pixel(self, total: F64) -> F64:
        mean: F64 = np.divide(
            total, self.count, out=np.full(len(total), np.nan), where=self.count > 0
        )
        return mean


def variance_bins(edges: Array) -> Fold[VarianceTotals, Mapping[str, Array], VarianceTotals]:
    """The fold over batches ``{"squared_error": …, "variance": …}`` of maps of one shape.

    A NaN in ``squared_error`` is a pixel without truth and is left out. ``edges`` (B-1, ascending)
    must be known beforehand: ``equal_width_edges`` or ``equal_mass_edges`` of a sample. Raises
    DataError for a negative or infinite number and edges that do not ascend.
    """
    inner = np.asarray(edges, dtype=np.float64)
    if inner.ndim != 1 or np.isnan(inner).any() or (np.diff(inner) < 0).any():
        raise DataError("edges of variance bins are one ascending row of numbers")
    bins = len(inner) + 1

    def init() -> VarianceTotals:
        zeros = np.zeros(bins)
        return VarianceTotals(inner, zeros.astype(np.int64), zeros, zeros)

    def update(totals: VarianceTotals, batch: Mapping[str, Array]) -> VarianceTotals:
        error, variance = known_pixels(
            batch["squared_error"], batch["variance"], ("squared_error", "variance")
        )
        if (error < 0).any() or (variance < 0).any():
            raise DataError("a squared error or a variance lies below 0")
        index = np.searchsorted(inner, variance.astype(np.float64))
        return VarianceTotals(
            inner,
            totals.count + np.bincount(index, minlength=bins),
            totals.squared_error_sum + np.bincount(index, error, bins),
            totals.variance_sum + np.bincount(index, variance, bins),
        )

    return Fold(init, update, _merge, lambda totals: totals)


def equal_width_edges(low: float, high: float, bins: int = N_BINS) -> F64:
    """Edges of bins of equal width between the least and greatest variance, bins - 1 of them.

    As in the paper. One outlier stretches all bins until nearly every pixel is in the first.
    """
    return np.linspace(low, high, bins + 1)[1:-1]


def equal_mass_edges(variance: Array, bins: int = N_BINS) -> F64:
    """Edges of bins of nearly equal counts of these variances (any shape), bins - 1 of them."""
    levels = np.arange(1, bins) / bins
    return np.quantile(np.asarray(variance, dtype=np.float64), levels, method="inverted_cdf")


def uncertainty_calibration_error(
    squared_error: Array, variance: Array, bins: int = N_BINS
) -> float:
    """UCE of maps of one shape over bins of equal width, as the paper has it.

    In squared target units; a NaN squared error is a pixel without truth. nan for no pixels.
    Raises DataError as ``variance_bins`` does.
    """
    error, claimed = known_pixels(squared_error, variance, ("squared_error", "variance"))
    if not len(claimed):
        return math.nan
    low, high = float(claimed.min()), float(claimed.max())
    fold = variance_bins(equal_width_edges(low, high, bins))
    return fold.update(fold.init(), {"squared_error": error, "variance": claimed}).uce


def expected_normalised_calibration_error(
    squared_error: Array, variance: Array, bins: int = N_BINS
) -> float:
    """ENCE of maps of one shape over bins of nearly equal counts; equal variances share a bin.

    A NaN squared error is a pixel without truth. nan for no pixels. Raises DataError as
    ``variance_bins`` does.
    """
    error, claimed = known_pixels(squared_error, variance, ("squared_error", "variance"))
    if not len(claimed):
        return math.nan
    fold = variance_bins(equal_mass_edges(claimed, bins))
    return fold.update(fold.init(), {"squared_error": error, "variance": claimed}).ence


def _merge(a: VarianceTotals, b: VarianceTotals) -> VarianceTotals:
    if not np.array_equal(a.edges, b.edges):
        raise DataError("variance totals with different edges cannot be added")
    return VarianceTotals(
        a.edges,
        a.count + b.count,
        a.squared_error_sum + b.squared_error_sum,
        a.variance_sum + b.variance_sum,
    )
