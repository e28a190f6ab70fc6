"""The additive statistics of calibration: one definition for command line, cluster and PromQL.

Each object is a handful of sums. ``update_*`` adds rows, ``merge`` adds two objects, and the
Prometheus counters of the service are these same sums, so that a query over counters and a fold
over a file give one number. Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from calibration.metrics.proper import brier_score, gaussian_crps, gaussian_log_loss
from posthoc.contract import F64, I64, Array, DataError
from posthoc.folds import Fold, log_loss_of_probs

N_BINS = 20
BIN_EDGES: F64 = np.arange(1, N_BINS + 1) / N_BINS  # upper edges
BIN_LABELS = tuple(f"{edge:.2f}" for edge in BIN_EDGES)
_ROUNDING = 1e-6  # a float32 softmax may sum to a hair above 1


def bin_index(confidence: Array) -> I64:
    """The confidence bin of each row, N int64 in 0…19: the smallest i with c <= (i+1)/20.

    Bins are right-closed, 0 belongs to the first and 1 to the last. Confidence is compared as
    float64 whatever it came as: a float32 0.15 is 0.1500000060 and so falls into "0.20".
    Raises DataError for a confidence outside [0, 1] or NaN, naming the row.
    """
    c = np.asarray(confidence, dtype=np.float64)
    bad = np.flatnonzero(~((c >= -_ROUNDING) & (c <= 1 + _ROUNDING)))
    if len(bad):
        raise DataError(f"row {bad[0]}: confidence {c.flat[bad[0]]} lies outside [0, 1]")
    return np.minimum(np.searchsorted(BIN_EDGES, c, side="left"), N_BINS - 1).astype(np.int64)


def level_name(alpha: float) -> str:
    """The coverage level 1-alpha as everyone writes it: "0.9" for 0.1, "0.95" for 0.05.

    Ten decimals absorb the rounding of ``1 - alpha``.
    """
    if not 0 < alpha < 1:
        raise DataError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    return f"{1 - alpha:.10f}".rstrip("0").rstrip(".")


@dataclass(frozen=True, slots=True)
class LevelTotals:
    """Sums over the labelled rows that were given a set or an interval at one level.

    ``size_sum`` adds set sizes (classification) or widths, averaged over outputs (regression).
    """

    labeled: int = 0
    covered: int = 0
    size_sum: float = 0.0

    @property
    def coverage(self) -> float:
        """Share of rows whose truth was inside; nan for no rows."""
        return _ratio(self.covered, self.labeled)

    @property
    def mean_size(self) -> float:
        """Mean set size or width; nan for no rows."""
        return _ratio(self.size_sum, self.labeled)


def _no_ints() -> I64:
    return np.zeros(N_BINS, dtype=np.int64)


def _no_floats() -> F64:
    return np.zeros(N_BINS)


@dataclass(frozen=True, slots=True)
class ClassificationTotals:
    """Sums over labelled rows. Per-bin arrays hold the 20 bins of ``bin_index``.

    ``scored`` counts the rows whose probs were known, which log loss and Brier cover. Ratios of
    no rows are nan.
    """

    count: I64 = field(default_factory=_no_ints)
    correct: I64 = field(default_factory=_no_ints)
    confidence_sum: F64 = field(default_factory=_no_floats)
    scored: int = 0
    log_loss_sum: float = 0.0
    brier_sum: float = 0.0
    levels: Mapping[str, LevelTotals] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Labelled rows."""
        return int(self.count.sum())

    @property
    def accuracy(self) -> float:
        """Share of rows whose label was right."""
        return _ratio(int(self.correct.sum()), self.n)

    @property
    def expected_accuracy(self) -> float:
        """Mean confidence: the accuracy that the model claims without any label."""
        return _ratio(float(self.confidence_sum.sum()), self.n)

    @property
    def ece(self) -> float:
        """Expected calibration error over 20 equal-width bins (Naeini et al. 2015; Guo et al.
        2017, eq. 3): ``sum_b |correct_b - confidence_sum_b| / n``. Biased upwards; see
        ``calibration_error.debiased_ece``."""
        return _ratio(float(np.abs(self.correct - self.confidence_sum).sum()), self.n)

    @property
    def log_loss(self) -> float:
        """Mean negative log-likelihood in nats of the rows with probs."""
        return _ratio(self.log_loss_sum, self.scored)

    @property
    def brier(self) -> float:
        """Mean of ``sum_c (p_c - 1[y=c])^2`` (Brier 1950), in 0…2, of the rows with probs."""
        return _ratio(self.brier_sum, self.scored)

    def coverage(self, level: str) -> float:
        """Coverage at a level name such as "0.9"; nan where no row had a set."""
        return self.levels.get(level, LevelTotals()).coverage


@dataclass(frozen=True, slots=True)
class RegressionTotals:
    """Sums over labelled rows; each row adds the mean over its K outputs.

    Coverage is joint: a row counts as covered when all K outputs lie inside their bounds. Ratios
    of no rows are nan.
    """

    n: int = 0
    squared_error_sum: float = 0.0
    absolute_error_sum: float = 0.0
    crps_sum: float = 0.0
    log_loss_sum: float = 0.0
    levels: Mapping[str, LevelTotals] = field(default_factory=dict)

    @property
    def rmse(self) -> float:
        """Root mean squared error, in the target's units."""
        return math.sqrt(_ratio(self.squared_error_sum, self.n))

    @property
    def mae(self) -> float:
        """Mean absolute error, in the target's units."""
        return _ratio(self.absolute_error_sum, self.n)

    @property
    def crps(self) -> float:
        """Mean continuous ranked probability score, in the target's units."""
        return _ratio(self.crps_sum, self.n)

    @property
    def log_loss(self) -> float:
        """Mean Gaussian negative log-density in nats per output."""
        return _ratio(self.log_loss_sum, self.n)

    def coverage(self, level: str) -> float:
        """Coverage at a level name such as "0.9"; nan where no row had an interval."""
        return self.levels.get(level, LevelTotals()).coverage


T = TypeVar("T", ClassificationTotals, RegressionTotals)


def update_classification(
    totals: ClassificationTotals,
    *,
    confidence: Array,
    label: Array,
    y: Array,
    probs: Array | None = None,
    covered: Array | None = None,
    level: str | Array | None = None,
    set_size: Array | None = None,
) -> ClassificationTotals:
    """Totals with N more labelled rows.

    ``confidence``, ``label`` (predicted class) and ``y`` (true class) are N; ``probs`` N×C, or
    None where they were not kept. ``covered`` (N bool: y in the set), ``set_size`` (N) and
    ``level`` (a level name for all rows, or N of them) are given together or not at all; for
    several levels of the same rows see ``update_level``. Probs are scored as they are, whether
    they sum to 1 or not, a 0 as the smallest normal float32. Raises DataError for lengths that
    differ, a confidence outside [0, 1], a label that is no class, and probs that hold NaN.
    """
    c = np.asarray(confidence, dtype=np.float64)
    _same_length(len(c), label=label, y=y, probs=probs)
    right = np.asarray(label) == np.asarray(y)
    index = bin_index(c)
    scored, log_loss_sum, brier_sum = totals.scored, totals.log_loss_sum, totals.brier_sum
    if probs is not None:
        scored += len(c)
        log_loss_sum += float(log_loss_of_probs(probs, y).sum())
        squared = brier_score(probs, y)
        _numbers(squared, "its Brier score")
        brier_sum += float(squared.sum())
    new = replace(
        totals,
        count=totals.count + np.bincount(index, minlength=N_BINS),
        correct=totals.correct + np.bincount(index[right], minlength=N_BINS),
        confidence_sum=totals.confidence_sum + np.bincount(index, weights=c, minlength=N_BINS),
        scored=scored,
        log_loss_sum=log_loss_sum,
        brier_sum=brier_sum,
    )
    return _maybe_level(new, len(c), level, covered, set_size)


def update_regression(
    totals: RegressionTotals,
    *,
    mean: Array,
    std: Array,
    y: Array,
    lower: Array | None = None,
    upper: Array | None = None,
    level: str | Array | None = None,
) -> RegressionTotals:
    """Totals with N more labelled rows.

    ``mean``, ``std`` and ``y`` are N×K (or N); so are ``lower`` and ``upper``, which come with
    ``level`` (a level name for all rows, or N of them) or not at all. An infinite interval makes
    the mean width of its level infinite. Raises DataError for shapes that differ, and for a NaN
    among them.
    """
    mu, sigma, truth = _rows_by_outputs(mean), _rows_by_outputs(std), _rows_by_outputs(y)
    _same_shape(mu, std=sigma, y=truth)
    error = truth - mu
    _numbers(error, "its error")
    _numbers(sigma, "its standard deviation")
    new = replace(
        totals,
        n=totals.n + len(mu),
        squared_error_sum=totals.squared_error_sum + float((error**2).mean(axis=1).sum()),
        absolute_error_sum=totals.absolute_error_sum + float(np.abs(error).mean(axis=1).sum()),
        crps_sum=totals.crps_sum + float(gaussian_crps(error, sigma).mean(axis=1).sum()),
        log_loss_sum=totals.log_loss_sum
        + float(gaussian_log_loss(error, sigma).mean(axis=1).sum()),
    )
    if lower is None or upper is None:
        return _maybe_level(new, len(mu), level, lower, upper)
    low, high = _rows_by_outputs(lower), _rows_by_outputs(upper)
    _same_shape(mu, lower=low, upper=high)
    _numbers(low, "its lower bound")
    _numbers(high, "its upper bound")
    covered = ((low <= truth) & (truth <= high)).all(axis=1)
    return _maybe_level(new, len(mu), level, np.asarray(covered), (high - low).mean(axis=1))


def update_level(totals: T, level: str | Array, *, covered: Array, size: Array) -> T:
    """Totals with N more labelled sets or intervals at ``level`` (one name, or N names).

    ``covered`` is N bool; ``size`` is N set sizes or widths.
    """
    inside, sizes = np.asarray(covered, dtype=bool), np.asarray(size, dtype=np.float64)
    _same_length(len(inside), size=sizes)
    names = np.asarray(level)
    if names.ndim:
        _same_length(len(inside), level=names)
    levels = dict(totals.levels)
    for name in np.unique(names):
        rows = np.broadcast_to(names == name, inside.shape)
        more = LevelTotals(int(rows.sum()), int(inside[rows].sum()), float(sizes[rows].sum()))
        levels[str(name)] = _add_level(levels.get(str(name), LevelTotals()), more)
    return replace(totals, levels=levels)


def merge(a: T, b: T) -> T:
    """The totals of both sets of rows: every sum added."""
    levels = {
        name: _add_level(a.levels.get(name, LevelTotals()), b.levels.get(name, LevelTotals()))
        for name in sorted({*a.levels, *b.levels})
    }
    sums = {f: getattr(a, f) + getattr(b, f) for f in a.__dataclass_fields__ if f != "levels"}
    return replace(a, levels=levels, **sums)


classification_totals: Fold[ClassificationTotals, Mapping[str, Any], ClassificationTotals] = Fold(
    init=ClassificationTotals,
    update=lambda totals, batch: update_classification(totals, **batch),
    merge=merge,
    result=lambda totals: totals,
)
"""The fold over batches that are the keyword arguments of ``update_classification``."""

regression_totals: Fold[RegressionTotals, Mapping[str, Any], RegressionTotals] = Fold(
    init=RegressionTotals,
    update=lambda totals, batch: update_regression(totals, **batch),
    merge=merge,
    result=lambda totals: totals,
)
"""The fold over batches that are the keyword arguments of ``update_regression``."""


def _ratio(total: float, n: int) -> float:
    return total / n if n else math.nan


def _add_level(a: LevelTotals, b: LevelTotals) -> LevelTotals:
    return LevelTotals(a.labeled + b.labeled, a.covered + b.covered, a.size_sum + b.size_sum)


def _maybe_level(
    totals: T, n: int, level: str | Array | None, covered: Array | None, size: Array | None
) -> T:
    if level is None and covered is None and size is None:
        return totals
    if level is None or covered is None or size is None:
        raise DataError("a level, its coverage and its sizes are given together or not at all")
    _same_length(n, covered=covered)
    return update_level(totals, level, covered=covered, size=size)


def _numbers(x: F64, what: str) -> None:
    """A NaN would make every later sum one, and no counter comes back from that."""
    missing = np.isnan(x)
    if missing.any():
        row = int(np.argmax(missing.reshape(len(x), -1).any(axis=1)))
        raise DataError(f"row {row}: {what} is NaN")


def _rows_by_outputs(x: Array) -> F64:
    a = np.asarray(x, dtype=np.float64)
    return a[:, None] if a.ndim == 1 else a


def _same_length(n: int, **arrays: Array | None) -> None:
    for name, a in arrays.items():
        if a is not None and len(a) != n:
            raise DataError(f"{name} has {len(a)} rows where there are {n}")


def _same_shape(like: F64, **arrays: F64) -> None:
    for name, a in arrays.items():
        if a.shape != like.shape:
            raise DataError(f"{name} has shape {a.shape} where the mean has {like.shape}")
