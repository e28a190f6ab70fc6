"""Smooth calibration error: no bins, and a bandwidth that the data choose.

Błasiok & Nakkiran 2023, "Smooth ECE: principled reliability diagrams via kernel smoothing"
(arXiv:2309.12236). With residuals ``r_i = right_i - c_i`` and a Gaussian kernel reflected at 0
and 1, ``smECE_s = ∫ |mean_i r_i K_s(t, c_i)| dt`` falls as the bandwidth s grows; the figure is
the one s with ``smECE_s = s``. It changes little when confidences do, which no binned ECE can say.

The reflected kernel is that of heat in [0, 1] without loss at the ends, so it multiplies the k-th
cosine coefficient by ``exp(-(pi k s)²/2)``: two cosine transforms on a grid smooth any number of
rows. Each residual is shared out to the two grid points beside its confidence, which moves smECE_s
by at most ``7.3e-9 / s²`` times the mean absolute residual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.fft import dct
from scipy.optimize import brentq

from calibration.metrics.rows import rated
from posthoc.contract import F64, Array
from posthoc.folds import Fold

CELLS = 4096


@dataclass(frozen=True, slots=True)
class SmoothTotals:
    """Sum of residuals at the 4,097 grid points of confidence 0…1, and rows."""

    n: int
    residual: F64

    @property
    def smooth_ece(self) -> float:
        """smECE, in 0…1; nan for no rows."""
        if not self.n:
            return math.nan
        waves = _waves(self.residual) / self.n
        least = _at(waves, 0.0)
        if least < 1e-12:
            return 0.0
        return float(brentq(lambda s: _at(waves, s) - s, 0.0, 2.0, xtol=1e-10))

    def at(self, bandwidth: float) -> float:
        """smECE at one bandwidth; nan for no rows."""
        return _at(_waves(self.residual) / self.n, bandwidth) if self.n else math.nan


def _update(totals: SmoothTotals, batch: Mapping[str, Array]) -> SmoothTotals:
    c, right = rated(batch["confidence"], batch["right"], least=0)
    place = c * CELLS
    left = np.minimum(place.astype(np.int64), CELLS - 1)
    share, residual = place - left, right - c
    new = np.bincount(left, residual * (1 - share), CELLS + 1)
    new += np.bincount(left + 1, residual * share, CELLS + 1)
    return SmoothTotals(totals.n + len(c), totals.residual + new)


smooth_totals: Fold[SmoothTotals, Mapping[str, Array], SmoothTotals] = Fold(
    init=lambda: SmoothTotals(0, np.zeros(CELLS + 1)),
    update=_update,
    merge=lambda a, b: SmoothTotals(a.n + b.n, a.residual + b.residual),
    result=lambda totals: totals,
)
"""The fold over batches ``{"confidence": N, "right": N}``; DataError as ``rows.rated``."""


def smooth_ece(confidence: Array, right: Array) -> float:
    """smECE of N rows. Raises DataError as ``rows.rated`` does."""
    c, hit = rated(confidence, right)
    return _update(smooth_totals.init(), {"confidence": c, "right": hit}).smooth_ece


def _waves(masses: F64) -> F64:
    """Cosine coefficients of point masses on the grid."""
    halved = masses / 2
    halved[[0, -1]] = masses[[0, -1]]  # the transform doubles all but its ends
    waves: F64 = dct(halved, type=1)
    return waves


def _at(waves: F64, bandwidth: float) -> float:
    decay = np.exp(-0.5 * (math.pi * bandwidth * np.arange(CELLS + 1)) ** 2)
    size = np.abs(dct(waves * decay, type=1))
    return float(size.sum() - (size[0] + size[-1]) / 2) / CELLS
