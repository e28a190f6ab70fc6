"""Top-label calibration: is the confidence right for each label that is given?

Gupta & Ramdas 2022, "Top-label calibration and multiclass-to-binary reductions", ICLR, eq. 4: the
calibration error of (confidence, label right) within the rows of each predicted label. Where the
over-confidence in one label and the doubt of another cancel, ECE sees nothing and this does. Bins
are the 20 right-closed ones of ``totals.bin_index``. Plug-in: it is biased upwards, and more so
than ECE, since every label has bins of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.metrics.rows import rated
from calibration.metrics.totals import N_BINS, bin_index
from posthoc.contract import F64, I64, Array
from posthoc.folds import Fold, class_index


@dataclass(frozen=True, slots=True)
class TopLabelTotals:
    """Sums over rows, C×20 by predicted label and bin of its confidence."""

    count: I64
    correct: I64
    confidence_sum: F64

    @property
    def n(self) -> int:
        """Rows seen."""
        return int(self.count.sum())

    @property
    def ece(self) -> float:
        """``sum_lb |correct - confidence_sum| / n``; nan for no rows."""
        gap = float(np.abs(self.correct - self.confidence_sum).sum())
        return gap / self.n if self.n else math.nan

    @property
    def per_label(self) -> F64:
        """Calibration error among the rows given each label, C; nan for a label never given."""
        n = self.count.sum(axis=1)
        gap = np.abs(self.correct - self.confidence_sum).sum(axis=1)
        error: F64 = np.divide(gap, n, out=np.full(len(n), np.nan), where=n > 0)
        return error


def top_label_bins(n_classes: int) -> Fold[TopLabelTotals, Mapping[str, Array], TopLabelTotals]:
    """The fold over batches ``{"confidence": N, "label": N, "right": N}``.

    Raises DataError as ``rows.rated`` does, and for a label that is no class.
    """

    def init() -> TopLabelTotals:
        whole = np.zeros((n_classes, N_BINS), np.int64)
        return TopLabelTotals(whole, whole, np.zeros((n_classes, N_BINS)))

    def update(totals: TopLabelTotals, batch: Mapping[str, Array]) -> TopLabelTotals:
        c, right = rated(batch["confidence"], batch["right"], least=0)
        cell = class_index(batch["label"], n_classes) * N_BINS + bin_index(c)
        size, shape = n_classes * N_BINS, (n_classes, N_BINS)
        return TopLabelTotals(
            totals.count + np.bincount(cell, minlength=size).reshape(shape),
            totals.correct + np.bincount(cell[right > 0], minlength=size).reshape(shape),
            totals.confidence_sum + np.bincount(cell, c, size).reshape(shape),
        )

    def merge(a: TopLabelTotals, b: TopLabelTotals) -> TopLabelTotals:
        return TopLabelTotals(
            a.count + b.count, a.correct + b.correct, a.confidence_sum + b.confidence_sum
        )

    return Fold(init, update, merge, lambda totals: totals)


def top_label_ece(confidence: Array, label: Array, right: Array, n_classes: int) -> float:
    """Top-label calibration error of N rows, as ``top_label_bins`` has it."""
    fold = top_label_bins(n_classes)
    batch = {"confidence": confidence, "label": label, "right": right}
    return fold.update(fold.init(), batch).ece
