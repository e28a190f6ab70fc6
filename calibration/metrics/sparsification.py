"""Sparsification: how fast the error falls when the most uncertain pixels are removed.

Ilg et al. 2018, "Uncertainty estimates and optimization for optical flow", ECCV, section 5. The
curve holds the mean error of the pixels that are left, over that of all; the oracle removes by
the true error. AUSE is the area between the two over the removed share 0…1, 0 for a perfect
ranking. A random order leaves the mean as it is in expectation, so its curve is 1 and its AUSE is
one less the oracle's area: an uncertainty that is worth anything lies below that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.metrics.dense import known_pixels
from posthoc.contract import F64, Array, DataError
from posthoc.folds import Fold

REMOVED: F64 = np.arange(100) / 100  # shares at which the curves are kept for a figure
_NAMES = ("error", "uncertainty")


@dataclass(frozen=True, slots=True)
class Sparsification:
    """The curves at the removed shares ``REMOVED`` (100 each), and exact areas over all pixels.

    ``random`` is the AUSE of a random order. All nan where every error is 0, or without pixels.
    """

    curve: F64
    oracle: F64
    ause: float
    random: float


def sparsification(error: Array, uncertainty: Array, *, root: bool = False) -> Sparsification:
    """Sparsification of maps of one shape; ``error`` is at least 0, NaN where there is no truth.

    With ``root`` the error is a squared one and the curves are those of its root mean (the RMSE
    that depth estimation reports; its random order is 1 only for many pixels). An area is the
    mean over all n removed shares 0, 1/n, …, (n-1)/n, nothing being left at 1. Pixels of equal
    uncertainty are removed in random order, in expectation, so the answer does not depend on
    where they lie. Pooled over images if the maps of several are given: an uncertainty that only
    tells hard images from easy ones then scores well, which ``mean_sparsification`` does not count.
    """
    e, u = known_pixels(error, uncertainty, _NAMES)
    if len(e) and e.min() < 0:
        raise DataError("an error lies below 0: give its absolute value, or its square")
    if not e.any():
        nothing = np.full(len(REMOVED), np.nan)
        return Sparsification(nothing, nothing, math.nan, math.nan)
    order = np.argsort(u)
    curve = _remaining(e[order], u[order], root)
    oracle = _remaining(np.sort(e), None, root)
    n = len(e)
    # In whole numbers: removing k per cent of n pixels leaves n - floor(k n / 100) of them.
    kept = n - np.arange(len(REMOVED)) * n // len(REMOVED) - 1
    area, best = float(curve.mean()), float(oracle.mean())
    return Sparsification(curve[kept], oracle[kept], area - best, 1 - best)


def ause(error: Array, uncertainty: Array, *, root: bool = False) -> float:
    """Area under the sparsification error of maps of one shape; see ``sparsification``."""
    return sparsification(error, uncertainty, root=root).ause


def image_ause(error: Array, uncertainty: Array, *, root: bool = False) -> dict[str, F64]:
    """Columns ``ause`` and ``ause_random`` of N images, maps N×…, for ``dense.image_figures``."""
    found = [sparsification(e, u, root=root) for e, u in zip(error, uncertainty, strict=True)]
    return {
        "ause": np.array([s.ause for s in found], dtype=np.float64),
        "ause_random": np.array([s.random for s in found], dtype=np.float64),
    }


@dataclass(frozen=True, slots=True)
class SparsificationTotals:
    """Sums of the images' sparsifications; ``images`` counts those that have an error above 0."""

    images: int
    total: Sparsification

    @property
    def mean(self) -> Sparsification:
        """Mean of the per-image curves and areas; nan for no image."""
        n = self.images or math.nan
        t = self.total
        return Sparsification(t.curve / n, t.oracle / n, t.ause / n, t.random / n)


def _zero() -> SparsificationTotals:
    zeros = np.zeros(len(REMOVED))
    return SparsificationTotals(0, Sparsification(zeros, zeros, 0.0, 0.0))


def _merge(a: SparsificationTotals, b: SparsificationTotals) -> SparsificationTotals:
    x, y = a.total, b.total
    total = Sparsification(
        x.curve + y.curve, x.oracle + y.oracle, x.ause + y.ause, x.random + y.random
    )
    return SparsificationTotals(a.images + b.images, total)


def mean_sparsification(
    *, root: bool = False
) -> Fold[SparsificationTotals, Mapping[str, Array], Sparsification]:
    """The fold over batches ``{"error": N×…, "uncertainty": N×…}`` of N images, each by itself."""

    def update(totals: SparsificationTotals, batch: Mapping[str, Array]) -> SparsificationTotals:
        for e, u in zip(batch["error"], batch["uncertainty"], strict=True):
            one = sparsification(e, u, root=root)
            if not math.isnan(one.ause):
                totals = _merge(totals, SparsificationTotals(1, one))
        return totals

    return Fold(_zero, update, _merge, lambda totals: totals.mean)


def _remaining(error: Array, by: Array | None, root: bool) -> F64:
    """Error of the first 1…n pixels over that of all n; ``by`` (ascending) tells which are tied."""
    sums = np.cumsum(error, dtype=np.float64)
    kept = np.arange(1, len(error) + 1)
    if by is not None:
        ends = np.flatnonzero(np.concatenate([by[1:] != by[:-1], [True]]))
        if len(ends) < len(error):
            sums = np.interp(kept, np.append(0, ends + 1), np.append(0.0, sums[ends]))
    curve: F64 = sums / kept / (sums[-1] / len(error))
    return np.sqrt(curve) if root else curve
