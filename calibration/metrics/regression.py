"""Probabilistic calibration of a regression: PIT, its histogram and PCE, observed quantiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from posthoc.contract import F64, I64, Array, DataError
from posthoc.folds import PROBABILITY_FLOOR, Fold

PIT_BINS = 20
PCE_LEVELS: F64 = np.arange(1, 101) / 101
_PER_ROOT = math.sqrt(2 / math.pi) * math.pi / 8  # mean over a of E|N(0, a(1-a))|


def gaussian_pit(mean: Array, std: Array, y: Array) -> F64:
    """Probability integral transform ``Phi((y - mean)/std)``, elementwise, in 0…1.

    Uniform where the predictive distribution is right (Dawid 1984, "The prequential approach").
    """
    sigma = np.maximum(np.asarray(std, dtype=np.float64), PROBABILITY_FLOOR)
    z = (np.asarray(y, dtype=np.float64) - np.asarray(mean, dtype=np.float64)) / sigma
    pit: F64 = ndtr(z)
    return pit


@dataclass(frozen=True, slots=True)
class PitTotals:
    """Counts of PIT values in 20 equal bins (``count``) and at most each PCE level (``below``)."""

    count: I64
    below: I64

    @property
    def n(self) -> int:
        """PIT values seen: rows times outputs."""
        return int(self.count.sum())

    @property
    def pce(self) -> float:
        """Probabilistic calibration error ``mean_j |j/101 - share of PIT <= j/101|``, j = 1…100.

        Dheur & Ben Taieb 2023, "A large-scale study of probabilistic calibration in neural
        network regression", section 2. nan for no rows.
        """
        return float(np.abs(PCE_LEVELS - self.below / self.n).mean()) if self.n else math.nan


def _update_pit(totals: PitTotals, batch: Array) -> PitTotals:
    z = np.asarray(batch, dtype=np.float64).ravel()
    if not ((z >= 0) & (z <= 1)).all():
        raise DataError("a PIT value lies outside [0, 1]")
    count, _ = np.histogram(z, bins=PIT_BINS, range=(0, 1))
    below = np.searchsorted(np.sort(z), PCE_LEVELS, side="right")
    return PitTotals(totals.count + count, totals.below + below)


pit_totals: Fold[PitTotals, Array, PitTotals] = Fold(
    init=lambda: PitTotals(
        np.zeros(PIT_BINS, dtype=np.int64), np.zeros(len(PCE_LEVELS), dtype=np.int64)
    ),
    update=_update_pit,
    merge=lambda a, b: PitTotals(a.count + b.count, a.below + b.below),
    result=lambda totals: totals,
)


def pce_sorted(pit: Array) -> float:
    """``mean_i |Z_(i) - i/(n+1)|`` of the n sorted PIT values Z: PCE without levels.

    Dheur & Ben Taieb 2023, section 4 (PCE-Sort with p = 1): the mean distance of order statistics
    from where uniform ones are expected. Its floor is that of PCE. Needs all values, 8 bytes each.
    Raises DataError for none, and for a value outside [0, 1].
    """
    z = np.sort(np.asarray(pit, dtype=np.float64).ravel())
    if not len(z):
        raise DataError("a calibration error needs at least one PIT value and there is none")
    if not (z[0] >= 0 and z[-1] <= 1):  # NaN is sorted last
        raise DataError("a PIT value lies outside [0, 1]")
    return float(np.abs(z - np.arange(1, len(z) + 1) / (len(z) + 1)).mean())


def perfect_pce(
    n: int, *, n_sim: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Where the PCE of n independent uniform PIT values lies: the range to read a PCE beside."""
    if n < 1:
        raise DataError("a calibration band needs at least one row and there is none")
    rng = np.random.default_rng(seed)
    cells = len(PCE_LEVELS) + 1
    below = np.cumsum(rng.multinomial(n, np.full(cells, 1 / cells), n_sim), axis=1)[:, :-1] / n
    pce = np.abs(below - PCE_LEVELS).mean(axis=1)
    low, high = np.quantile(pce, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pce_floor(n_test: int, n_calibration: int | None = None) -> float:
    """Expected PCE of a perfect model on ``n_test`` independent PIT values, ``0.3133/sqrt(n)``.

    With ``n_calibration``, of a model whose distribution was recalibrated on that many rows.
    """
    return _PER_ROOT * math.sqrt(1 / n_test + (1 / n_calibration if n_calibration else 0))


def observed_quantiles(quantiles: Array, levels: Sequence[float], y: Array) -> F64:
    """Share of y (N×K or N) at most each predicted quantile (N×K×Q or N×Q); length Q.

    For honest quantiles it equals ``levels`` up to chance.
    """
    q, truth = np.asarray(quantiles, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if q.shape != (*truth.shape, len(levels)):
        raise DataError(f"quantiles have shape {q.shape} for y {truth.shape}, {len(levels)} levels")
    below: F64 = (truth[..., None] <= q).reshape(-1, len(levels)).mean(axis=0)
    return below
