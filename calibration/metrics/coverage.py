"""Coverage of sets and intervals: what chance allows, and how it splits by set size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import betabinom

from calibration.bundle import conformal_rank
from posthoc.contract import I64, DataError
from posthoc.folds import Fold, class_index


def coverage_band(
    n_conformal: int, n_test: int, alpha: float, *, level: float = 0.99
) -> tuple[float, float]:
    """Where the coverage of ``n_test`` rows lies with probability ``level`` for valid sets.

    With untied scores the number of covered rows is BetaBinomial(n_test, k, n_conformal+1-k), k
    being the conformal rank (Vovk 2012, "Conditional validity of inductive conformal
    predictors"), so the luck of both samples is counted. Central, ends included. (1, 1) where
    n_conformal is too small for the level: everything is then covered. For tied scores and
    non-empty sets only the lower end means anything.
    """
    if n_test < 1:
        raise DataError("a coverage band needs at least one test row")
    k = conformal_rank(n_conformal, alpha)
    if k > n_conformal:
        return 1.0, 1.0
    covered = betabinom(n_test, k, n_conformal + 1 - k)
    # scipy's own ppf sums from 0 at every step of a search; beyond 12 sd there is no mass to find.
    reach = 12 * covered.std() + 12
    first = max(0, math.floor(covered.mean() - reach))
    counts = np.arange(first, min(n_test, math.ceil(covered.mean() + reach)) + 1)
    tail = (1 - level) / 2
    ends = np.searchsorted(np.cumsum(covered.pmf(counts)), [tail, 1 - tail])
    low, high = counts[np.minimum(ends, len(counts) - 1)] / n_test
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class SetTotals:
    """Sums by set size 0…C: how many sets, and how many of them held the true class."""

    count: I64
    covered: I64

    @property
    def n(self) -> int:
        """Sets seen."""
        return int(self.count.sum())

    @property
    def coverage(self) -> float:
        """Share of sets with the true class; nan for none."""
        return float(self.covered.sum()) / self.n if self.n else math.nan

    @property
    def empty_share(self) -> float:
        """Share of sets without any class; nan for none."""
        return float(self.count[0]) / self.n if self.n else math.nan

    @property
    def mean_size(self) -> float:
        """Mean number of classes in a set; nan for none."""
        return float(np.arange(len(self.count)) @ self.count) / self.n if self.n else math.nan

    @property
    def coverage_by_size(self) -> dict[int, float]:
        """Coverage among the sets of each size that occurs.

        Angelopoulos et al. 2021, "Uncertainty sets for image classifiers using conformal
        prediction", size-stratified coverage: only their average is promised.
        """
        return {
            int(s): float(self.covered[s]) / float(self.count[s])
            for s in np.flatnonzero(self.count)
        }


def set_sizes(n_classes: int) -> Fold[SetTotals, Mapping[str, Any], SetTotals]:
    """The fold over batches ``{"set": N×C bool, "y": N classes}``."""

    def init() -> SetTotals:
        zeros = np.zeros(n_classes + 1, dtype=np.int64)
        return SetTotals(zeros, zeros)

    def update(totals: SetTotals, batch: Mapping[str, Any]) -> SetTotals:
        inside = np.asarray(batch["set"], dtype=bool)
        if inside.ndim != 2 or inside.shape[1] != n_classes:
            raise DataError(f"sets over {n_classes} classes have shape {inside.shape}")
        size = inside.sum(axis=1)
        hit = inside[np.arange(len(inside)), class_index(batch["y"], n_classes)]
        return SetTotals(
            totals.count + np.bincount(size, minlength=n_classes + 1),
            totals.covered + np.bincount(size[hit], minlength=n_classes + 1),
        )

    def merge(a: SetTotals, b: SetTotals) -> SetTotals:
        return SetTotals(a.count + b.count, a.covered + b.covered)

    return Fold(init, update, merge, lambda totals: totals)
