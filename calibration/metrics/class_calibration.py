"""Calibration error class by class: does a probability 0.3 of a class mean 30 % of that class?

The static calibration error of Nixon et al. 2019, "Measuring calibration in deep learning",
section 3 (class-wise ECE in Kull et al. 2019). In a segmentation the largest class hides the
others in the figure over top labels; here each has its own. Bins are the 20 right-closed ones of
``totals.bin_index``. Plug-in, not debiased: the noise of correlated pixels is not that of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.metrics.totals import N_BINS, bin_index
from posthoc.contract import F64, I64, Array, DataError
from posthoc.folds import Fold


@dataclass(frozen=True, slots=True)
class ClassTotals:
    """Sums over pixels, C×20 by class and bin of that class's probability.

    ``count`` pixels, ``hits`` those of the class itself, ``probability_sum`` what was claimed.
    """

    count: I64
    hits: I64
    probability_sum: F64

    @property
    def n(self) -> int:
        """Pixels seen."""
        return int(self.count[0].sum())

    @property
    def per_class(self) -> F64:
        """``sum_b |hits_b - probability_sum_b| / n`` of each class, C; nan for no pixels."""
        gaps: F64 = np.abs(self.hits - self.probability_sum).sum(axis=1)
        return gaps / self.n if self.n else np.full(len(gaps), np.nan)

    @property
    def static(self) -> float:
        """Mean over all classes, those that never occur included; nan for no pixels."""
        return float(self.per_class.mean())


def class_bins(
    n_classes: int, *, axis: int = 1
) -> Fold[ClassTotals, Mapping[str, Array], ClassTotals]:
    """The fold over batches ``{"probs": N×C×…, "y": N×…}``; ``axis`` is that of the classes.

    ``y`` holds class indices, -1 where a pixel has no truth: it is left out. Raises DataError for
    shapes that do not match, a probability outside [0, 1] or NaN at any pixel, another label.
    """

    def init() -> ClassTotals:
        shape = (n_classes, N_BINS)
        return ClassTotals(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape))

    def update(totals: ClassTotals, batch: Mapping[str, Array]) -> ClassTotals:
        maps = np.moveaxis(np.asarray(batch["probs"]), axis, 0)
        y = np.asarray(batch["y"])
        if maps.shape != (n_classes, *y.shape):
            raise DataError(
                f"probs have shape {np.shape(batch['probs'])} for {n_classes} classes on axis "
                f"{axis} and labels {y.shape}"
            )
        y = y.reshape(-1)
        if y.dtype.kind not in "iu" or (y.size and not -1 <= y.min() <= y.max() < n_classes):
            raise DataError(
                f"labels are {y.dtype}: class indices below {n_classes}, -1 for no truth"
            )
        known = y >= 0
        every = bool(known.all())
        truth = y if every else y[known]
        new = init()
        for c in range(n_classes):
            p = maps[c].reshape(-1)
            p = p if every else p[known]
            index = probability_bins(p)
            new.count[c] = np.bincount(index, minlength=N_BINS)
            new.hits[c] = np.bincount(index[truth == c], minlength=N_BINS)
            new.probability_sum[c] = np.bincount(index, p, N_BINS)
        return _merge(totals, new)

    return Fold(init, update, _merge, lambda totals: totals)


def per_class_ece(probs: Array, y: Array, *, axis: int = 1) -> F64:
    """Calibration error of each of the C classes on ``axis`` of probs, as ``class_bins`` has it."""
    fold = class_bins(np.shape(probs)[axis], axis=axis)
    return fold.update(fold.init(), {"probs": probs, "y": y}).per_class


def _merge(a: ClassTotals, b: ClassTotals) -> ClassTotals:
    return ClassTotals(a.count + b.count, a.hits + b.hits, a.probability_sum + b.probability_sum)


def probability_bins(p: Array) -> I64:
    """``bin_index``, six times faster for float32: 20 p is then exact in float64."""
    if p.dtype != np.float32 or not p.size or not (p.min() >= 0 and p.max() <= 1):
        return bin_index(p)
    upper = np.ceil(p.astype(np.float64) * N_BINS).astype(np.int64)
    return np.maximum(upper - 1, 0)
