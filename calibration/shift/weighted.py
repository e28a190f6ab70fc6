"""Weighted conformal thresholds: coverage where rows will be drawn otherwise than they were.

With w the ratio of the density that rows will have to the one that conformal rows had, the set of
scores at most the (1-alpha) quantile of ``sum_i w_i delta(s_i) + w delta(inf)``, w being the new
row's own weight, covers the truth with probability 1-alpha (Tibshirani, Barber, Candès & Ramdas
2019, arXiv:1904.06019, Theorem 2). That holds for the true weights; with estimated ones, as nearly
as they are right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from calibration.shift.density_ratio import DensityRatio
from posthoc.contract import F64, Array, DataError, FitError

if TYPE_CHECKING:
    from posthoc.graph import Fragment

Shift = Literal["target", "covariate"]
WEIGHTS, OWN, RATIO = "shift_weights", "shift_own", "shift_ratio/"
LEAST_ROWS = 50.0  # effective ones, below which an estimate of weights says little
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Weighted:
    """Conformal scores n, ascending, with their weights n.

    ``by`` target: ``own`` are the weights that a new row may have, of each class, or one that none
    exceeds. ``by`` covariate: ``ratio`` says the weight of a row.
    """

    by: Shift
    scores: Array
    weights: F64
    own: F64
    ratio: DensityRatio | None = None

    @property
    def width(self) -> int:
        """Thresholds of one level: one a class, or one."""
        return max(1, len(self.own))

    @property
    def effective(self) -> float:
        """The effective sample size (Kish): (sum w)² / sum w²."""
        return effective_rows(self.weights)

    def thresholds(self, alpha: float) -> F64:
        """What the graph's input ``q_hat`` takes for a level: a threshold for each class (or one),
        and by covariates the level 1-alpha, which the graph makes a row's own threshold of."""
        if self.by == "covariate":
            return np.asarray([1.0 - alpha])
        return np.asarray([threshold(self.scores, self.weights, alpha, w) for w in self.own])

    def of_rows(self, level: Array | float, z: Array, phi: Array | None = None) -> F64:
        """Thresholds N of rows with outputs z N×C and features N×D at levels 1-alpha, a scalar or
        N."""
        assert self.ratio is not None
        total = np.cumsum(self.weights)
        wanted = np.asarray(level, np.float64) * (total[-1] + self.ratio.weights(z, phi))
        index = np.searchsorted(total, wanted * (1 - _ROUNDING), side="left")
        return np.asarray(np.append(np.asarray(self.scores, np.float64), np.inf)[index])

    def emit_of_rows(self, g: Fragment, level: str, z: str, phi: str | None = None) -> str:
        """`of_rows` as a graph fragment."""
        from posthoc.graph import emit_count_below

        assert self.ratio is not None
        total = np.cumsum(self.weights)
        share = total / total[-1]
        relative = g.op("Mul", self.ratio.emit(g, z, phi), g.const(1.0 / float(total[-1])))
        wanted = g.op("Mul", level, g.op("Add", relative, g.const(1.0)))
        # Float32 must not say that a sum suffices which does not: a rank more is on the safe side.
        index = g.cast(emit_count_below(g, share * (1 - 1e-6), wanted), "int64")
        return g.op("Gather", g.const(np.append(self.scores, np.inf)), index, axis=0)

    def tensors(self) -> dict[str, Array]:
        """What a bundle keeps beside the sorted scores."""
        found: dict[str, Array] = {WEIGHTS: self.weights, OWN: self.own}
        if self.ratio is not None:
            found |= {f"{RATIO}{k}": v for k, v in self.ratio.tensors().items()}
        return found


def weighted(
    by: Shift, scores: Array, weights: Array, own: Array, ratio: DensityRatio | None = None
) -> Weighted:
    """Thresholds from conformal scores n and their weights n, in any order.

    Raises FitError where too few rows are effective to know the weights, naming how many are.
    """
    s, w = np.asarray(scores), np.asarray(weights, np.float64)
    if len(s) != len(w) or not np.isfinite(w).all() or (w < 0).any() or not w.any():
        raise FitError("weights of conformal rows are finite, at least 0, and one a row")
    order = np.argsort(s, kind="stable")
    effective = effective_rows(w)
    if effective < LEAST_ROWS:
        raise FitError(
            f"under this shift {len(w)} conformal rows are worth {effective:.1f} (their effective "
            f"sample size), and {LEAST_ROWS:.0f} are the least: the production rows are too unlike "
            "the labelled ones; label some of them, or give more rows"
        )
    return Weighted(by, s[order], w[order], np.asarray(own, np.float64), ratio)


def restored(by: Shift, tensors: Mapping[str, Array], scores: Array) -> Weighted:
    """What a bundle keeps of a weighted threshold."""
    parts = {k[len(RATIO) :]: v for k, v in tensors.items() if k.startswith(RATIO)}
    ratio = DensityRatio.restored(parts) if parts else None
    return Weighted(by, scores, tensors[WEIGHTS], tensors[OWN], ratio)


def threshold(scores: Array, weights: Array, alpha: float, own: float) -> float:
    """The weighted quantile of ascending ``scores`` n with mass ``own`` at infinity; +inf where the
    others do not suffice. Raises DataError for a level outside (0, 1)."""
    if not 0 < alpha < 1:
        raise DataError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    total = np.cumsum(np.asarray(weights, np.float64))
    if math.isinf(own) or not len(total):
        return math.inf
    # A hair less: equal weights must have the rank that ceil((n+1)(1-alpha)) says.
    wanted = (1 - alpha) * (total[-1] + own) * (1 - _ROUNDING)
    index = int(np.searchsorted(total, wanted, side="left"))
    return float(np.asarray(scores)[index]) if index < len(total) else math.inf


def effective_rows(weights: Array) -> float:
    """(sum w)² / sum w² of weights n."""
    w = np.asarray(weights, np.float64)
    return float(w.sum() ** 2 / (w**2).sum())
