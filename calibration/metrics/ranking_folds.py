"""Ranking figures over rows that come in batches: exact at 8 bytes a row, or in constant memory.

``exact_ranking`` keeps every score. ``ranking_histogram`` keeps two counts a cell, and each of its
figures comes with a bound on its error that the counts themselves give: what the pairs of rows
that share a cell could change. Rows are negatives and positives (errors, or strange rows), scores
larger for the stranger one; for the risk of a confidence c the score is ``-c`` (or ``1 - c``), and
positives are the wrong rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma

from calibration.metrics.ranking import Bounded, RiskCoverage, aupr, auroc, fpr95, risk_coverage
from posthoc.contract import F64, I64, Array, DataError
from posthoc.folds import Fold

CELLS = 4096


@dataclass(frozen=True, slots=True)
class RankedRows:
    """Scores of all rows, by side: 8 bytes a row. Figures raise DataError for an empty side."""

    negatives: tuple[F64, ...] = ()
    positives: tuple[F64, ...] = ()

    @property
    def n(self) -> int:
        """Rows kept."""
        return sum(map(len, self.negatives)) + sum(map(len, self.positives))

    @property
    def nbytes(self) -> int:
        """Bytes of the scores kept."""
        return sum(a.nbytes for a in (*self.negatives, *self.positives))

    @property
    def auroc(self) -> float:
        """As ``ranking.auroc``."""
        return auroc(*self._sides())

    @property
    def aupr(self) -> float:
        """As ``ranking.aupr``."""
        return aupr(*self._sides())

    @property
    def fpr95(self) -> float:
        """As ``ranking.fpr95``."""
        return fpr95(*self._sides())

    @property
    def risk_coverage(self) -> RiskCoverage:
        """The curve of 0/1 errors for scores that are a confidence turned round."""
        sides = self._sides()
        wrong = np.repeat([0.0, 1.0], [len(s) for s in sides])
        return risk_coverage(-np.concatenate(sides), wrong)

    def _sides(self) -> tuple[F64, F64]:
        return np.concatenate([*self.negatives, []]), np.concatenate([*self.positives, []])


def _keep(rows: RankedRows, batch: Mapping[str, Array]) -> RankedRows:
    new = RankedRows(
        *(
            (np.array(_finite(batch[side], side)),) if np.size(batch[side]) else ()
            for side in ("negatives", "positives")
        )
    )
    return _join(rows, new)


def _join(a: RankedRows, b: RankedRows) -> RankedRows:
    return RankedRows(a.negatives + b.negatives, a.positives + b.positives)


exact_ranking: Fold[RankedRows, Mapping[str, Array], RankedRows] = Fold(
    init=RankedRows, update=_keep, merge=_join, result=lambda rows: rows
)
"""The fold over batches ``{"negatives": N scores, "positives": M scores}``; DataError for NaN."""


@dataclass(frozen=True, slots=True)
class RankTotals:
    """Counts of negatives and positives in equal cells of low…high; what lies beyond is in the
    outer ones. A figure with an empty side is nan, and so is its bound."""

    low: float
    high: float
    negatives: I64
    positives: I64

    @property
    def auroc(self) -> Bounded:
        """Pairs in one cell count half: off by at most half their share of all pairs."""
        n, m = self.negatives, self.positives
        pairs = float(n.sum()) * float(m.sum())
        if not pairs:
            return Bounded(math.nan, math.nan)
        below = np.cumsum(n) - n
        together = float((n.astype(np.float64) * m).sum())
        return Bounded((float((below * m).sum()) + together / 2) / pairs, together / 2 / pairs)

    @property
    def aupr(self) -> Bounded:
        """Average precision with the rows of a cell as ties, between the bounds of every order
        and every tie in it."""
        n, m = self.negatives[::-1].astype(np.float64), self.positives[::-1].astype(np.float64)
        if not (n.any() and m.any()):
            return Bounded(math.nan, math.nan)
        some = m > 0
        found, false = np.cumsum(m)[some], np.cumsum(n)[some]
        n, m = n[some], m[some]
        value = m * found / (found + false)
        most = m * found / (found + false - n)
        # Negatives first: the k-th positive of the cell then has precision (F + k) / (F + k + U).
        before = found - m + false
        least = m - false * _harmonic(before, m)
        total = m.sum()
        error = max((value - least).sum(), (most - value).sum()) / total
        return Bounded(float(value.sum() / total), float(error))

    @property
    def fpr95(self) -> Bounded:
        """Positives at most the 95 % threshold of negatives, which lies somewhere in one cell."""
        n, m = int(self.negatives.sum()), int(self.positives.sum())
        if not n or not m:
            return Bounded(math.nan, math.nan)
        cell = int(np.searchsorted(np.cumsum(self.negatives), math.ceil(0.95 * n)))
        upper = float(self.positives[: cell + 1].sum())
        half = float(self.positives[cell]) / 2
        return Bounded((upper - half) / m, half / m)

    @property
    def aurc(self) -> Bounded:
        """Mean selective risk of 0/1 errors, the rows of a cell in random order."""
        rows, wrong, before, errors = self._risky()
        if not len(rows):
            return Bounded(math.nan, math.nan)
        h, total = _harmonic(before, rows), rows.sum()
        rate = wrong / rows
        area = rate * rows + (errors - rate * before) * h
        # Errors first or last: at no row of the cell is their number further from its mean.
        error = wrong * (rows - wrong) / rows * h
        return Bounded(float(area.sum() / total), float(error.sum() / total))

    @property
    def augrc(self) -> Bounded:
        """Area under risk × coverage of 0/1 errors, the rows of a cell in random order."""
        rows, wrong, _, errors = self._risky()
        if not len(rows):
            return Bounded(math.nan, math.nan)
        square = float(rows.sum()) ** 2
        area = (rows * errors + rows * wrong / 2).sum() / square
        return Bounded(float(area), float((wrong * (rows - wrong)).sum()) / 2 / square)

    def _risky(self) -> tuple[F64, F64, F64, F64]:
        """Of each filled cell: rows, errors, and the rows and errors in the cells before it."""
        wrong = self.positives.astype(np.float64)
        rows = self.negatives + wrong
        before, errors = np.cumsum(rows) - rows, np.cumsum(wrong) - wrong
        some = rows > 0
        return rows[some], wrong[some], before[some], errors[some]


def ranking_histogram(
    low: float, high: float, cells: int = CELLS
) -> Fold[RankTotals, Mapping[str, Array], RankTotals]:
    """The fold over batches ``{"negatives": N scores, "positives": M scores}``, 16 bytes a cell.

    Scores should lie in low…high, which a first sample tells (of ``-confidence``: -1…0); those
    beyond share the outer cells, and the bounds count that too. Raises DataError for NaN, and for
    a range that is empty or infinite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high and cells > 0):
        raise DataError(f"cells of scores need a finite range, not {low}…{high}")

    def init() -> RankTotals:
        zeros = np.zeros(cells, np.int64)
        return RankTotals(low, high, zeros, zeros)

    def count(batch: Mapping[str, Array], side: str) -> I64:
        x = np.clip(_finite(batch[side], side), low, high)
        cell = np.minimum(((x - low) * (cells / (high - low))).astype(np.int64), cells - 1)
        return np.bincount(cell, minlength=cells)

    def update(totals: RankTotals, batch: Mapping[str, Array]) -> RankTotals:
        new = RankTotals(low, high, count(batch, "negatives"), count(batch, "positives"))
        return _add(totals, new)

    return Fold(init, update, _add, lambda totals: totals)


def _add(a: RankTotals, b: RankTotals) -> RankTotals:
    if (a.low, a.high, len(a.negatives)) != (b.low, b.high, len(b.negatives)):
        raise DataError("counts over different cells of scores cannot be added")
    return RankTotals(a.low, a.high, a.negatives + b.negatives, a.positives + b.positives)


def _harmonic(before: F64, n: F64) -> F64:
    """``1/(before+1) + … + 1/(before+n)``."""
    h: F64 = digamma(before + n + 1) - digamma(before + 1)
    return h


def _finite(x: Array, side: str) -> F64:
    a = np.asarray(x, dtype=np.float64).ravel()
    if np.isnan(a).any():
        raise DataError(f"{side}: row {int(np.isnan(a).argmax())} is NaN")
    return a
