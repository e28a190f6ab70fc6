"""The Brier score taken apart: reliability, resolution, uncertainty, and what bins hide.

Murphy 1973, "A new vector partition of the probability score": reliability is how far
probabilities are from what happens, resolution how much what happens differs between them,
uncertainty what the frequencies of the classes alone would score. Over bins the three do not add
up to the score; with the variance within bins and the covariance there with the outcome they do,
to the last digit (Stephenson, Coelho & Jolliffe 2008, "Two extra components in the Brier score
decomposition"): ``brier = reliability - resolution + uncertainty + within_variance -
within_covariance``. Bins are the 20 right-closed ones of ``totals.bin_index``, of each class's
probability by itself; every part is summed over classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.metrics.class_calibration import ClassTotals, probability_bins
from calibration.metrics.rows import class_probabilities
from calibration.metrics.totals import N_BINS
from posthoc.contract import F64, Array
from posthoc.folds import Fold


@dataclass(frozen=True, slots=True)
class BrierTotals:
    """Sums over rows, C×20 by class and bin of its probability p: counts, hits and p (``bins``),
    p² (``square_sum``), and p of the rows of the class itself (``hit_sum``). All parts, in the
    score's own 0…2, are nan for no rows."""

    bins: ClassTotals
    square_sum: F64
    hit_sum: F64

    @property
    def n(self) -> int:
        """Rows seen."""
        return self.bins.n

    @property
    def brier(self) -> float:
        """Mean of ``sum_c (p_c - 1[y=c])²``."""
        return self._mean(self.square_sum - 2 * self.hit_sum + self.bins.hits)

    @property
    def reliability(self) -> float:
        """What calibration could win, 0 at best; see ``reliability``."""
        return reliability(self.bins)

    @property
    def resolution(self) -> float:
        """Variance of the observed frequencies between bins; larger is better."""
        n = np.maximum(self.bins.count, 1)
        frequency = self.bins.hits.sum(axis=1, keepdims=True) / max(self.n, 1)
        return self._mean(self.bins.count * (self.bins.hits / n - frequency) ** 2)

    @property
    def uncertainty(self) -> float:
        """``sum_c f_c (1 - f_c)`` of the classes' frequencies; no model changes it."""
        if not self.n:
            return math.nan
        f = self.bins.hits.sum(axis=1) / self.n
        return float((f * (1 - f)).sum())

    @property
    def within_variance(self) -> float:
        """Variance of probabilities within bins."""
        n = np.maximum(self.bins.count, 1)
        return self._mean(self.square_sum - self.bins.probability_sum**2 / n)

    @property
    def within_covariance(self) -> float:
        """Twice the covariance of probability and outcome within bins."""
        n = np.maximum(self.bins.count, 1)
        return 2 * self._mean(self.hit_sum - self.bins.probability_sum * self.bins.hits / n)

    @property
    def generalised_resolution(self) -> float:
        """Resolution with what bins hide: ``brier = reliability - this + uncertainty``."""
        return self.resolution - self.within_variance + self.within_covariance

    @property
    def skill(self) -> float:
        """``1 - brier / uncertainty``: 0 for who always says the classes' frequencies, 1 at best;
        nan where every row is of one class."""
        u = self.uncertainty
        return 1 - self.brier / u if u else math.nan

    def _mean(self, sums: Array) -> float:
        return float(np.sum(sums)) / self.n if self.n else math.nan


def reliability(bins: ClassTotals) -> float:
    """``sum_c sum_b n_cb (mean p - frequency)² / n``; nan for no rows.

    Plug-in: a perfect model shows about ``sum_cb f(1-f) / n`` over the filled bins. Read it beside
    ``perfect.perfect_class_ranges``.
    """
    gaps = (bins.probability_sum - bins.hits) ** 2 / np.maximum(bins.count, 1)
    return float(gaps.sum()) / bins.n if bins.n else math.nan


def brier_parts(n_classes: int) -> Fold[BrierTotals, Mapping[str, Array], BrierTotals]:
    """The fold over batches ``{"probs": N×C, "y": N}``; for a binary model C is 2, and the score
    and its parts are twice those of the one probability.

    Raises DataError as ``rows.class_probabilities`` does: NaN, rows that do not sum to 1.
    """

    def init() -> BrierTotals:
        whole, real = np.zeros((n_classes, N_BINS), np.int64), np.zeros((n_classes, N_BINS))
        return BrierTotals(ClassTotals(whole, whole.copy(), real), real.copy(), real.copy())

    def update(totals: BrierTotals, batch: Mapping[str, Array]) -> BrierTotals:
        probs, y = class_probabilities(batch["probs"], batch["y"], n_classes)
        new = init()
        for c in range(n_classes):
            p = np.ascontiguousarray(probs[:, c])
            index, exact, hit = probability_bins(p), p.astype(np.float64), y == c
            new.bins.count[c] = np.bincount(index, minlength=N_BINS)
            new.bins.hits[c] = np.bincount(index[hit], minlength=N_BINS)
            new.bins.probability_sum[c] = np.bincount(index, exact, N_BINS)
            new.square_sum[c] = np.bincount(index, exact**2, N_BINS)
            new.hit_sum[c] = np.bincount(index[hit], exact[hit], N_BINS)
        return _merge(totals, new)

    return Fold(init, update, _merge, lambda totals: totals)


def _merge(a: BrierTotals, b: BrierTotals) -> BrierTotals:
    return BrierTotals(
        ClassTotals(
            a.bins.count + b.bins.count,
            a.bins.hits + b.bins.hits,
            a.bins.probability_sum + b.bins.probability_sum,
        ),
        a.square_sum + b.square_sum,
        a.hit_sum + b.hit_sum,
    )
