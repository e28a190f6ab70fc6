"""Thresholds with finite-sample promises: p-values, the Neyman–Pearson flag, and abstention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from posthoc.contract import F64, Array, DataError

TABLE = 1024  # points of a p-value table inside the graph


def pvalue_table(scores: Array, points: int = TABLE) -> tuple[F64, F64]:
    """(thresholds ascending m, p-values m+1) for p = (1 + #{reference >= s}) / (n + 1).

    ``p[j]`` belongs to a score above exactly j thresholds. Up to ``points`` reference scores the
    table is exact; beyond, the largest half of the points keeps every extreme score and the rest
    is thinned evenly, each p-value rounded up, so the test stays valid (Vovk et al. 2005, ch. 2).
    """
    s = np.sort(np.asarray(scores, np.float64))
    n = len(s)
    if n <= points:
        keep = np.arange(n)
    else:
        half = points // 2
        thin = np.linspace(0, n - half - 1, points - half).round().astype(int)
        keep = np.unique(np.concatenate([thin, np.arange(n - half, n)]))
    table = s[keep]
    # A score above thresholds[j-1] but not above thresholds[j] is, at worst, equal to the first
    # reference above thresholds[j-1]: all references from there on count as at least as strange.
    above = np.searchsorted(s, table, side="right")
    at_least = n - np.concatenate([[0], above])
    return table, (1.0 + at_least) / (n + 1.0)


def pvalues(table: Array, p: Array, scores: Array) -> F64:
    """p-values of ``scores`` by the table: one binary search a row."""
    return np.asarray(np.asarray(p)[np.searchsorted(table, scores, side="left")], np.float64)


def neyman_pearson_rank(n: int, alpha: float, delta: float) -> int | None:
    """Smallest rank k of n clean scores with P(Binomial(n, 1-alpha) >= k) <= delta, or None.

    Flagging scores above the k-th smallest has a false-alarm rate above alpha with probability at
    most delta over the calibration draw (Tong, Feng & Li 2018, umbrella algorithm, Prop. 1).
    """
    k = int(binom.isf(delta, n, 1 - alpha)) + 1  # smallest k with sf(k-1) <= delta
    while k > 1 and binom.sf(k - 2, n, 1 - alpha) <= delta:
        k -= 1
    while k <= n and binom.sf(k - 1, n, 1 - alpha) > delta:
        k += 1
    return k if k <= n else None


def neyman_pearson_rows(alpha: float, delta: float) -> int:
    """The fewest clean rows that can hold the promise: (1-alpha)^n <= delta."""
    return math.ceil(math.log(delta) / math.log(1 - alpha) - 1e-12)


@dataclass(frozen=True, slots=True)
class Abstention:
    """Answer when confidence > threshold (None: never); ``answered`` is the share answered."""

    threshold: float | None
    answered: float


def fit_abstention(
    grid_confidence: Array,
    confidence: Array,
    wrong: Array,
    max_error: float,
    delta: float,
    *,
    least: float = -1.0,
    grid_wrong: Array | None = None,
) -> Abstention:
    """The loosest confidence threshold whose error among answered rows is at most ``max_error``
    with probability 1-delta over ``confidence`` and ``wrong`` (N each, conformal rows).

    Tests strict to loose on exact binomial tails (Angelopoulos et al. 2021, "Learn then test",
    arXiv:2110.01052); the sequence of thresholds comes from other rows and starts where enough rows
    are answered for one to pass. A failure ends it, and where few rows are answered one wrong
    answer is a failure: so, with the labels of the other rows (``grid_wrong``), half of delta is
    kept for a second start, where these rows are surest of the promise; who comes there without a
    failure has the whole (Wiens 2003, "A fixed sequence Bonferroni procedure", Pharm. Stat. 2).
    ``least`` lies below every possible confidence: as a threshold it answers every row.

    Raises DataError for a level outside (0, 1), lengths that differ, a confidence that is NaN, or
    no other rows.
    """
    for name, level in (("max_error", max_error), ("delta", delta)):
        if not 0 < level < 1:
            raise DataError(f"{name} must lie strictly between 0 and 1, not {level}")
    c, w = _answers(confidence, wrong)
    _answers(grid_confidence, grid_wrong)
    if len(np.asarray(grid_confidence)) == 0:
        raise DataError("the thresholds to try come from other rows, and there are none")
    order = np.argsort(-c, kind="stable")
    c_sorted, wrong_sorted = c[order], np.cumsum(w[order])
    grid = np.unique(np.quantile(np.asarray(grid_confidence, np.float64), np.linspace(0, 1, 101)))
    grid = np.concatenate([[least], grid])[::-1]
    second = 0
    if grid_wrong is not None:
        second = _surest(grid, grid_confidence, grid_wrong, max_error)
    best: float | None = None
    left = delta / 2 if second else delta
    for i, t in enumerate(grid):
        if second and i == second:
            left += delta / 2
        answered = int(np.searchsorted(-c_sorted, -t, side="left"))
        if left == 0 or answered < neyman_pearson_rows(max_error, left):
            continue
        errors = int(wrong_sorted[answered - 1])
        if binom.cdf(errors, answered, max_error) > left:
            left = 0.0
        else:
            best = float(t)
    return Abstention(best, 0.0 if best is None else float((c > best).mean()))


def _answers(confidence: Array, wrong: Array | None) -> tuple[F64, Array]:
    c = np.asarray(confidence, np.float64)
    w = np.zeros(len(c), bool) if wrong is None else np.asarray(wrong, bool)
    if len(w) != len(c):
        raise DataError(f"there are {len(c)} confidences and {len(w)} answers, right or wrong")
    if np.isnan(c).any():
        raise DataError(f"row {int(np.isnan(c).argmax())}: its confidence is NaN")
    return c, w


def _surest(grid: Array, confidence: Array, wrong: Array, max_error: float) -> int:
    """Where in a falling grid the rows' own test has its smallest p-value."""
    order = np.argsort(-np.asarray(confidence, np.float64), kind="stable")
    sorted_c = np.asarray(confidence, np.float64)[order]
    errors = np.concatenate([[0], np.cumsum(np.asarray(wrong, bool)[order])])
    answered = np.searchsorted(-sorted_c, -np.asarray(grid, np.float64), side="left")
    return int(np.argmin(binom.cdf(errors[answered], answered, max_error)))
