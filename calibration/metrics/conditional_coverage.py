"""Coverage within parts of the rows: by set size, and by a group that is known.

What is promised is the average over all rows. A part of them may be covered less, and the worst
one is what its rows see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration.bundle import conformal_rank
from calibration.metrics.coverage import SetTotals, coverage_band
from posthoc.contract import DataError
from posthoc.folds import Fold

STRATA = ((0, 1), (2, 3), (4, 10), (11, 100), (101, 1000))
N_SIM = 1000


def strata_counts(
    totals: SetTotals, strata: Sequence[tuple[int, int]] = STRATA
) -> tuple[tuple[int, int], ...]:
    """(sets, covered) of each stratum of sizes, ends included, that holds any set.

    Larger sets than the last stratum knows are in it.
    """
    found = []
    for i, (first, last) in enumerate(strata):
        part = slice(first, None if i == len(strata) - 1 else last + 1)
        n = int(totals.count[part].sum())
        if n:
            found.append((n, int(totals.covered[part].sum())))
    return tuple(found)


def size_stratified_violation(
    totals: SetTotals, alpha: float, strata: Sequence[tuple[int, int]] = STRATA
) -> float:
    """The largest ``|coverage - (1 - alpha)|`` over strata of set sizes; nan for no sets.

    SSCV of Angelopoulos et al. 2021, "Uncertainty sets for image classifiers using conformal
    prediction", section 4.2. A stratum of few sets rules it by chance alone: read it beside
    ``violation_range``.
    """
    parts = strata_counts(totals, strata)
    return max((abs(k / n - (1 - alpha)) for n, k in parts), default=math.nan)


def violation_range(
    counts: Sequence[int],
    n_conformal: int,
    alpha: float,
    *,
    n_sim: int = N_SIM,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Where the violation lies when parts of ``counts`` sets are covered alike.

    One coverage for all is drawn from Beta(k, n+1-k), k being the conformal rank, and each part's
    hits from it. (alpha, alpha) where n_conformal is too small for the level: all is covered then.
    """
    if not len(counts) or min(counts) < 1:
        raise DataError("a violation needs parts of at least one set each")
    k = conformal_rank(n_conformal, alpha)
    if k > n_conformal:
        return alpha, alpha
    rng = np.random.default_rng(seed)
    share = rng.beta(k, n_conformal + 1 - k, n_sim)[:, None]
    covered = rng.binomial(np.asarray(counts), share) / np.asarray(counts)
    worst = np.abs(covered - (1 - alpha)).max(axis=1)
    low, high = np.quantile(worst, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class PartCoverage:
    """Coverage of the ``n`` rows of one part beside the 99 % beta-binomial band of its size."""

    name: str
    n: int
    coverage: float
    low: float
    high: float


GroupCounts = Mapping[str, tuple[int, int]]


def _count(counts: GroupCounts, batch: Mapping[str, Any]) -> GroupCounts:
    covered, names = np.asarray(batch["covered"], dtype=bool), np.asarray(batch["group"])
    if covered.ndim != 1 or names.shape != covered.shape:
        raise DataError(f"group has shape {names.shape} where covered has {covered.shape}")
    found, code = np.unique(names, return_inverse=True)
    n = np.bincount(code, minlength=len(found))
    k = np.bincount(code[covered], minlength=len(found))
    return _add(counts, {str(f): (int(n[i]), int(k[i])) for i, f in enumerate(found)})


def _add(a: GroupCounts, b: GroupCounts) -> GroupCounts:
    names = sorted({*a, *b})
    pairs = ((a.get(g, (0, 0)), b.get(g, (0, 0))) for g in names)
    return {g: (x[0] + y[0], x[1] + y[1]) for g, (x, y) in zip(names, pairs, strict=True)}


group_counts: Fold[GroupCounts, Mapping[str, Any], GroupCounts] = Fold(
    init=dict, update=_count, merge=_add, result=lambda counts: counts
)
"""The fold over batches ``{"covered": N bool, "group": N names}``: (rows, covered) by group."""


def coverage_by_group(
    counts: GroupCounts,
    n_conformal: int | Mapping[str, int],
    alpha: float,
    *,
    independent: Mapping[str, int] | None = None,
) -> tuple[PartCoverage, ...]:
    """Coverage of each group, the least covered first, beside the band for its own rows.

    ``n_conformal`` is the number of conformal rows behind the threshold: of all, or by group where
    each has a threshold of its own (one that is missing there raises DataError). Under a shared
    threshold the band is what luck allows a group that is like all rows, not a promise. Among many
    groups one in a hundred lies outside by chance. ``independent`` counts by group what the band
    may count where that is less than the rows (items of which there are several rows).
    """
    found = []
    for name, (n, k) in counts.items():
        if not isinstance(n_conformal, int) and name not in n_conformal:
            raise DataError(f"group {name!r}: the conformal rows behind its threshold are unknown")
        behind = n_conformal if isinstance(n_conformal, int) else n_conformal[name]
        units = n if independent is None else independent[name]
        found.append(PartCoverage(name, n, k / n, *coverage_band(behind, units, alpha)))
    return tuple(sorted(found, key=lambda p: (p.coverage, p.name)))
