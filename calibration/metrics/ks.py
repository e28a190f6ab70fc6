"""Kolmogorov–Smirnov calibration error: the largest cumulated gap, without bins.

Gupta et al. 2021, "Calibration of neural networks using splines", ICLR, eq. 6: with rows in the
order of their confidence, ``max_k |sum_{i<=k} (right_i - c_i)| / n``. It is at most the ECE
that gives each distinct confidence a bin, and ``|accuracy - mean confidence|`` where the model is
over- or under-confident throughout. Plug-in: read it beside ``perfect.perfect_ranges``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.metrics.ranking import Bounded
from calibration.metrics.rows import rated
from posthoc.contract import F64, Array
from posthoc.folds import Fold

CELLS = 4096


def ks_error(confidence: Array, right: Array) -> float:
    """KS error of N rows, in 0…1; rows of equal confidence count together, whatever their order.

    Raises DataError as ``rows.rated`` does.
    """
    c, hit = rated(confidence, right)
    order = np.argsort(c, kind="stable")
    c = c[order]
    gap = np.cumsum(hit[order] - c)
    ends = np.append(c[1:] != c[:-1], True)
    return float(np.abs(gap[ends]).max()) / len(c)


@dataclass(frozen=True, slots=True)
class KsTotals:
    """Sums of residuals ``right - c``, and of their absolute values, over 4,096 cells of
    confidence, closed on the right."""

    n: int
    residual: F64
    size: F64

    @property
    def ks(self) -> Bounded:
        """KS error and how much larger it may be: half of what one cell holds, ``max size / 2n``.

        It is never smaller; nan for no rows.
        """
        if not self.n:
            return Bounded(math.nan, math.nan)
        gap = np.abs(np.cumsum(self.residual))
        return Bounded(float(gap.max()) / self.n, float(self.size.max()) / 2 / self.n)


def _update(totals: KsTotals, batch: Mapping[str, Array]) -> KsTotals:
    c, right = rated(batch["confidence"], batch["right"], least=0)
    cell = np.maximum(np.ceil(c * CELLS).astype(np.int64) - 1, 0)
    residual = right - c
    return KsTotals(
        totals.n + len(c),
        totals.residual + np.bincount(cell, residual, CELLS),
        totals.size + np.bincount(cell, np.abs(residual), CELLS),
    )


ks_totals: Fold[KsTotals, Mapping[str, Array], KsTotals] = Fold(
    init=lambda: KsTotals(0, np.zeros(CELLS), np.zeros(CELLS)),
    update=_update,
    merge=lambda a, b: KsTotals(a.n + b.n, a.residual + b.residual, a.size + b.size),
    result=lambda totals: totals,
)
"""The fold over batches ``{"confidence": N, "right": N}``; DataError as ``rows.rated``."""
