"""Calibration error over bins of equal mass, or of any edges: the adaptive ECE.

Nguyen & O'Connor 2015, "Posterior calibration and exploratory analysis for natural language
processing models"; Nixon et al. 2019, "Measuring calibration in deep learning". Equal widths
leave most bins of a good classifier nearly empty; equal counts do not. Still plug-in: read it
beside ``perfect.perfect_ranges``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.metrics.rows import rated
from calibration.metrics.totals import N_BINS
from calibration.metrics.uce import equal_mass_edges
from posthoc.contract import F64, I64, Array, DataError
from posthoc.folds import Fold


@dataclass(frozen=True, slots=True)
class ConfidenceBins:
    """Sums over rows by bin of confidence; bin b holds ``edges[b-1] < c <= edges[b]``.

    ``edges`` (B-1, ascending) lie between the B bins; 0 is in the first and 1 in the last.
    """

    edges: F64
    count: I64
    correct: I64
    confidence_sum: F64

    @property
    def n(self) -> int:
        """Rows seen."""
        return int(self.count.sum())

    @property
    def ece(self) -> float:
        """``sum_b |correct_b - confidence_sum_b| / n``; nan for no rows."""
        gap = float(np.abs(self.correct - self.confidence_sum).sum())
        return gap / self.n if self.n else math.nan

    @property
    def max_gap(self) -> float:
        """Maximum calibration error: the largest |accuracy - confidence| of a filled bin
        (Naeini, Cooper & Hauskrecht 2015); nan for no rows. Small bins rule it."""
        filled = self.count > 0
        gap = np.abs(self.correct - self.confidence_sum)[filled] / self.count[filled]
        return float(gap.max()) if len(gap) else math.nan


def confidence_bins(edges: Array) -> Fold[ConfidenceBins, Mapping[str, Array], ConfidenceBins]:
    """The fold over batches ``{"confidence": N, "right": N}`` for inner ``edges`` (B-1, ascending)
    that are known beforehand: ``uce.equal_mass_edges`` of a sample, or of all rows.

    Raises DataError as ``rows.rated`` does, and for edges that do not ascend.
    """
    inner = np.asarray(edges, dtype=np.float64)
    if inner.ndim != 1 or np.isnan(inner).any() or (np.diff(inner) < 0).any():
        raise DataError("edges of confidence bins are one ascending row of numbers")
    bins = len(inner) + 1

    def init() -> ConfidenceBins:
        whole = np.zeros(bins, np.int64)
        return ConfidenceBins(inner, whole, whole, np.zeros(bins))

    def update(totals: ConfidenceBins, batch: Mapping[str, Array]) -> ConfidenceBins:
        c, right = rated(batch["confidence"], batch["right"], least=0)
        index = np.searchsorted(inner, c, side="left")
        return ConfidenceBins(
            inner,
            totals.count + np.bincount(index, minlength=bins),
            totals.correct + np.bincount(index[right > 0], minlength=bins),
            totals.confidence_sum + np.bincount(index, c, bins),
        )

    return Fold(init, update, _merge, lambda totals: totals)


def equal_mass_ece(confidence: Array, right: Array, bins: int = N_BINS) -> float:
    """ECE over ``bins`` bins of nearly equal counts; rows of equal confidence share a bin.

    One distinct confidence is one bin: the gap between it and the accuracy. Raises DataError as
    ``rows.rated`` does.
    """
    c, hit = rated(confidence, right)
    fold = confidence_bins(equal_mass_edges(c, bins))
    return fold.update(fold.init(), {"confidence": c, "right": hit}).ece


def _merge(a: ConfidenceBins, b: ConfidenceBins) -> ConfidenceBins:
    if not np.array_equal(a.edges, b.edges):
        raise DataError("confidence bins with different edges cannot be added")
    return ConfidenceBins(
        a.edges,
        a.count + b.count,
        a.correct + b.correct,
        a.confidence_sum + b.confidence_sum,
    )
