"""Scores of intervals and quantiles, and how sharp a predictive distribution is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, Array, DataError
from posthoc.folds import Fold


def interval_score(lower: Array, upper: Array, y: Array, alpha: float) -> F64:
    """``width + 2/alpha · (distance of y from the interval)``, elementwise, in the target's units.

    Winkler 1972, "A decision-theoretic approach to interval estimation"; proper for the central
    1-alpha interval (Gneiting & Raftery 2007, eq. 43). Infinite where a bound is. Raises DataError
    for shapes that differ, alpha outside (0, 1), NaN, and an upper bound below the lower one.
    """
    if not 0 < alpha < 1:
        raise DataError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    low, high, truth = (np.asarray(a, dtype=np.float64) for a in (lower, upper, y))
    if low.shape != truth.shape or high.shape != truth.shape:
        raise DataError(f"bounds {low.shape} and {high.shape} do not match y {truth.shape}")
    bad = np.flatnonzero(~(low <= high).reshape(-1) | np.isnan(truth).reshape(-1))
    if len(bad):
        row = int(bad[0]) // max(1, truth[0].size)
        raise DataError(f"row {row}: bounds cross, or they or y are NaN")
    miss = np.maximum(low - truth, 0) + np.maximum(truth - high, 0)
    # An unbounded side is never missed, but inf - inf would say NaN.
    score: F64 = np.where(np.isinf(low) | np.isinf(high), np.inf, high - low + 2 / alpha * miss)
    return score


def pinball_loss(quantile: Array, y: Array, level: float) -> F64:
    """``max(level (y - q), (level - 1) (y - q))``, elementwise: proper for the ``level`` quantile.

    Koenker & Bassett 1978, "Regression quantiles". Twice its mean over all levels is the CRPS
    (Gneiting & Ranjan 2011). Raises DataError for a level outside (0, 1) and shapes that differ.
    """
    if not 0 < level < 1:
        raise DataError(f"a quantile level lies strictly between 0 and 1, not {level}")
    q, truth = np.asarray(quantile, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if q.shape != truth.shape:
        raise DataError(f"quantiles have shape {q.shape} where y has {truth.shape}")
    above = truth - q
    loss: F64 = np.maximum(level * above, (level - 1) * above)
    return loss


@dataclass(frozen=True, slots=True)
class IntervalTotals:
    """Sums over intervals (rows times outputs) at one level; ratios of none are nan."""

    n: int = 0
    below: int = 0  # targets under their interval
    above: int = 0
    width_sum: float = 0.0
    score_sum: float = 0.0

    @property
    def score(self) -> float:
        """Mean interval score, in the target's units."""
        return self._mean(self.score_sum)

    @property
    def mean_width(self) -> float:
        """Sharpness of intervals (Gneiting, Balabdaoui & Raftery 2007)."""
        return self._mean(self.width_sum)

    @property
    def coverage(self) -> float:
        """Share of targets inside, each output by itself."""
        return self._mean(self.n - self.below - self.above)

    def _mean(self, total: float) -> float:
        return total / self.n if self.n else math.nan


def interval_totals(alpha: float) -> Fold[IntervalTotals, Mapping[str, Array], IntervalTotals]:
    """The fold over batches ``{"lower": …, "upper": …, "y": …}`` of one shape; DataError as
    ``interval_score``."""

    def update(totals: IntervalTotals, batch: Mapping[str, Array]) -> IntervalTotals:
        low, high, y = (np.asarray(batch[k], dtype=np.float64) for k in ("lower", "upper", "y"))
        score = interval_score(low, high, y, alpha)
        new = IntervalTotals(
            y.size,
            int((y < low).sum()),
            int((y > high).sum()),
            float((high - low).sum()),
            float(score.sum()),
        )
        return merge(totals, new)

    def merge(a: IntervalTotals, b: IntervalTotals) -> IntervalTotals:
        fields = IntervalTotals.__dataclass_fields__
        return IntervalTotals(*(getattr(a, f) + getattr(b, f) for f in fields))

    return Fold(IntervalTotals, update, merge, lambda totals: totals)


@dataclass(frozen=True, slots=True)
class Sharpness:
    """Mean and spread of predicted standard deviations σ, in the target's units; nan for none.

    Smaller is sharper, and worth something only where the model is calibrated (Gneiting,
    Balabdaoui & Raftery 2007, "Probabilistic forecasts, calibration and sharpness").
    """

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of (σ - mean)², which no large σ rounds away

    @property
    def mean_std(self) -> float:
        """Mean σ."""
        return self.mean if self.n else math.nan

    @property
    def mean_variance(self) -> float:
        """Mean σ², the sharpness of Kuleshov, Fenner & Ermon 2018, section 3.5."""
        return self.mean**2 + self.squares / self.n if self.n else math.nan

    @property
    def dispersion(self) -> float:
        """Coefficient of variation of σ (Levi et al. 2022): 0 where all rows have one error bar.

        Over n - 1; nan for less than two rows or where every σ is 0.
        """
        if self.n < 2 or not self.mean:
            return math.nan
        return math.sqrt(self.squares / (self.n - 1)) / self.mean


def _sharpen(totals: Sharpness, batch: Array) -> Sharpness:
    std = np.asarray(batch, dtype=np.float64).ravel()
    if not ((std >= 0) & np.isfinite(std)).all():
        raise DataError("a standard deviation is NaN, infinite or below 0")
    if not std.size:
        return totals
    mean = float(std.mean())
    return _pooled(totals, Sharpness(std.size, mean, float(((std - mean) ** 2).sum())))


def _pooled(a: Sharpness, b: Sharpness) -> Sharpness:
    n = a.n + b.n
    if not n:
        return a
    apart, share = b.mean - a.mean, b.n / n
    return Sharpness(n, a.mean + apart * share, a.squares + b.squares + apart**2 * a.n * share)


sharpness: Fold[Sharpness, Array, Sharpness] = Fold(
    init=Sharpness, update=_sharpen, merge=_pooled, result=lambda totals: totals
)
"""The fold over arrays of predicted standard deviations, of any shape."""
