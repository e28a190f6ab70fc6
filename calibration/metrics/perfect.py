"""What a perfectly calibrated model would show: the range to read a calibration error beside.

A plug-in calibration error of finite rows is above 0 for every model, and no percentile interval
of it is right. So outcomes are drawn from the model's own probabilities, and the figure of such
outcomes is worked out again and again (consistency resampling: Bröcker & Smith 2007, "Increasing
the reliability of reliability diagrams"). A figure above its range is no accident of few rows.
Rows count as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from calibration.metrics.class_calibration import ClassTotals, class_bins, probability_bins
from calibration.metrics.rows import class_probabilities, rated
from calibration.metrics.totals import N_BINS
from calibration.metrics.uce import VarianceTotals, equal_mass_edges
from posthoc.contract import F64, Array, DataError

N_SIM = 200
_BLOCK = 1 << 20  # numbers held at a time while drawing labels

Range = tuple[float, float]


def perfect_ranges(
    confidence: Array,
    figures: Mapping[str, Callable[[F64], float]],
    *,
    n_sim: int = N_SIM,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Range]:
    """Where each figure lies, as (low, high), when row i is right with probability
    ``confidence[i]``.

    A figure takes N outcomes (0 or 1) in the order of ``confidence`` (N). All share the draws.
    Raises DataError as ``rows.rated`` does.
    """
    c, _ = rated(confidence, np.zeros(np.shape(confidence)))
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(n_sim):
        right = (rng.random(len(c)) < c).astype(np.float64)
        for name, figure in figures.items():
            drawn[name].append(figure(right))
    return {name: _range(values, level) for name, values in drawn.items()}


def perfect_class_ranges(
    probs: Array,
    figures: Mapping[str, Callable[[ClassTotals], float]],
    *,
    n_sim: int = N_SIM,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Range]:
    """The same for figures of class-wise bins, when labels are drawn from ``probs`` (N×C).

    Raises DataError as ``rows.class_probabilities`` does, and for no rows.
    """
    n, n_classes = np.shape(probs)
    p, y = class_probabilities(probs, np.zeros(n, np.int64), n_classes)
    if not n:
        raise DataError("a calibration band needs at least one row and there is none")
    fold = class_bins(n_classes)
    bins = fold.update(fold.init(), {"probs": p, "y": y})
    cells = n_classes * N_BINS
    hits = np.zeros((n_sim, cells), np.int64)
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // max(n_classes, n_sim))
    for first in range(0, n, step):
        block = np.clip(np.asarray(p[first : first + step], np.float64), 0.0, None)
        upto = np.cumsum(block, axis=1)
        upto /= upto[:, -1:]
        upto[:, -1] = 1.0
        # Row by row in one search: row r owns the numbers from r to r + 1.
        start = np.arange(len(block))[:, None]
        draws = rng.random((len(block), n_sim)) + start
        flat = np.searchsorted((upto + start).ravel(), draws.ravel(), side="right")
        flat = np.minimum(flat.reshape(draws.shape), (start + 1) * n_classes - 1)
        index = probability_bins(block.ravel())[flat]
        cell = (flat - start * n_classes) * N_BINS + index
        for i in range(n_sim):
            hits[i] += np.bincount(cell[:, i], minlength=cells)
    drawn = [replace(bins, hits=h.reshape(n_classes, N_BINS)) for h in hits]
    return {name: _range([figure(b) for b in drawn], level) for name, figure in figures.items()}


def perfect_ence(
    variance: Array,
    *,
    bins: int = N_BINS,
    n_sim: int = N_SIM,
    seed: int = 0,
    level: float = 0.95,
) -> Range:
    """Where the ENCE over bins of equal counts lies when errors are N(0, ``variance``), of any
    shape. Raises DataError for no variance, and for one that is negative or not finite."""
    claimed = np.sort(np.asarray(variance, dtype=np.float64).ravel())
    if not len(claimed):
        raise DataError("a calibration band needs at least one row and there is none")
    if not (claimed[0] >= 0 and np.isfinite(claimed[-1])):
        raise DataError("a variance is negative or not finite")
    edges = equal_mass_edges(claimed, bins)
    index = np.searchsorted(edges, claimed)
    count = np.bincount(index, minlength=bins)
    total = np.bincount(index, claimed, bins).astype(np.float64)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(n_sim):
        squared = claimed * rng.standard_normal(len(claimed)) ** 2
        error = np.bincount(index, squared, bins).astype(np.float64)
        drawn.append(VarianceTotals(edges, count, error, total).ence)
    return _range(drawn, level)


def _range(values: list[float], level: float) -> Range:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
