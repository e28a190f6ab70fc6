"""Before and after, on labelled rows that the renewal did not use; and whether it is any better."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from calibration.bundle import Guarantee, conformal_rank, threshold_at
from calibration.conformal.cells import UNKNOWN, Cells
from calibration.conformal.intervals import bounds, interval_scores
from calibration.head import Head, row_thresholds
from calibration.metrics.bootstrap import Estimate, paired_difference
from calibration.metrics.coverage import coverage_band
from calibration.metrics.proper import gaussian_crps
from calibration.metrics.totals import (
    ClassificationTotals,
    RegressionTotals,
    level_name,
    update_classification,
    update_regression,
)
from calibration.renew.rows import Labelled
from calibration.renew.thresholds import members, scores_of, sureness
from calibration.shift.weighted import Weighted
from posthoc.contract import F64, Array
from posthoc.folds import log_loss_of_probs

BAND = 0.99  # of chance, shared over the cells of a level (Bonferroni)


@dataclass(frozen=True, slots=True)
class Level:
    """Coverage of a level on measured rows, and where chance has it if the promise holds.

    With thresholds of their own for classes or groups the band is that of each, and ``outside``
    names those that leave theirs; ``low`` and ``high`` are None then. ``size`` is the mean number
    of classes, or the mean width; None: infinite.
    """

    level: str
    n: int
    coverage: float
    low: float | None
    high: float | None
    inside: bool
    size: float | None
    outside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Figures:
    """What one bundle is worth on the measured rows: means by name, coverage by level, the share
    of rows that it answers and the error among them (None: it never abstains, or answers none)."""

    means: dict[str, float]
    levels: tuple[Level, ...]
    answered: float | None = None
    answered_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """``loss`` names what is compared, ``difference`` is its paired mean after less before with a
    95 % interval. ``better`` and ``worse`` say in what."""

    rows: int
    before: Figures
    after: Figures
    loss: str
    difference: Estimate
    better: tuple[str, ...]
    worse: tuple[str, ...]

    @property
    def publish(self) -> bool:
        """Whether the new one is better in something, and worse in nothing."""
        return bool(self.better) and not self.worse

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "publish": self.publish}


def figures(
    head: Head,
    guarantees: tuple[Guarantee, ...],
    scores: Array,
    rows: Labelled,
    u: Array,
    wrong: Array | None,
) -> Figures:
    """The figures of a head on rows as it serves them; ``scores`` are its conformal ones, sorted,
    and ``wrong`` N tells which answers are, where it abstains."""
    levels = (
        _sets(head, guarantees, scores, rows, u)
        if head.task == "classification"
        else _intervals(head, guarantees, scores, rows)
    )
    answered = error = None
    if head.abstains and wrong is not None:
        kept = sureness(rows) > (math.inf if head.abstain is None else head.abstain)
        answered = float(kept.mean())
        error = float(wrong[kept].mean()) if kept.any() else None
    return Figures(_means(rows), levels, answered, error)


def compare(before: Figures, after: Figures, old: Labelled, new: Labelled, seed: int) -> Comparison:
    """The two on the same rows, as either serves them."""
    name = "nll" if old.probs is not None else "crps"
    difference = paired_difference(losses(new), losses(old), seed=seed)
    better, worse = [], []
    if difference.high < 0:
        better.append(f"{name} falls by {-difference.value:.4g}")
    if difference.low > 0:
        worse.append(f"{name} rises by {difference.value:.4g}")
    for a, b in zip(before.levels, after.levels, strict=True):
        if b.inside and not a.inside:
            better.append(
                f"coverage at {a.level} comes back, from {a.coverage:.4f} to {b.coverage:.4f}"
            )
        if a.inside and not b.inside:
            worse.append(f"coverage at {a.level} leaves its band, with {b.coverage:.4f}")
    return Comparison(len(old), before, after, name, difference, tuple(better), tuple(worse))


def losses(rows: Labelled) -> F64:
    """Log loss N in nats, or CRPS N in the target's units, as the mean over outputs."""
    if rows.probs is not None:
        return log_loss_of_probs(rows.probs, np.asarray(rows.y, np.int64))
    assert rows.mean is not None and rows.std is not None
    return np.asarray(gaussian_crps(rows.y - rows.mean.astype(np.float64), rows.std).mean(1))


def _means(rows: Labelled) -> dict[str, float]:
    if rows.probs is not None:
        assert rows.label is not None and rows.confidence is not None
        c = update_classification(
            ClassificationTotals(),
            confidence=rows.confidence,
            label=rows.label,
            y=np.asarray(rows.y, np.int64),
            probs=rows.probs,
        )
        return {"accuracy": c.accuracy, "nll": c.log_loss, "ece": c.ece, "brier": c.brier}
    assert rows.mean is not None and rows.std is not None
    r = update_regression(RegressionTotals(), mean=rows.mean, std=rows.std, y=rows.y)
    return {"rmse": r.rmse, "crps": r.crps, "nll": r.log_loss}


def _sets(
    head: Head, guarantees: tuple[Guarantee, ...], scores: Array, rows: Labelled, u: Array
) -> tuple[Level, ...]:
    y = np.asarray(rows.y, np.int64)
    inside = np.zeros((len(guarantees), len(rows)), bool)
    size = np.zeros(len(guarantees))
    for part, s in scores_of(head, rows, u):
        own = rows.take(part)
        for i, g in enumerate(guarantees):
            sets = s <= _thresholds(head, g, own)
            inside[i, part] = sets[np.arange(len(s)), y[part]]
            size[i] += float(sets.sum())
    return tuple(
        _level(head, g, scores, rows, inside[i], float(size[i]) / len(rows))
        for i, g in enumerate(guarantees)
    )


def _intervals(
    head: Head, guarantees: tuple[Guarantee, ...], scores: Array, rows: Labelled
) -> tuple[Level, ...]:
    assert rows.mean is not None and rows.std is not None
    score = interval_scores(head.interval, rows.y, rows.mean, rows.std)
    found = []
    for g in guarantees:
        q = np.broadcast_to(_thresholds(head, g, rows), (len(rows), 1))
        lower, upper = bounds(head.interval, q, rows.mean, rows.std)
        width = float((upper - lower).mean())
        found.append(_level(head, g, scores, rows, score <= q[:, 0], width))
    return tuple(found)


def _thresholds(head: Head, g: Guarantee, rows: Labelled) -> Array:
    """Thresholds of a level that broadcast with scores of rows, float32 as the graph has them."""
    q: float | Array = math.inf if g.threshold is None else g.threshold
    if head.cells is not None:
        q = head.cells.thresholds(g.alpha)
    like = rows.probs if rows.probs is not None else rows.mean
    assert like is not None
    return row_thresholds(head, q, like, rows.group, None).astype(np.float32)


def _level(
    head: Head, g: Guarantee, scores: Array, rows: Labelled, inside: Array, size: float
) -> Level:
    covered = float(inside.mean())
    name, mean_size = level_name(g.alpha), size if math.isfinite(size) else None
    if isinstance(head.cells, Cells):
        outside = _outside(head.cells, g, rows, inside)
        return Level(name, len(rows), covered, None, None, not outside, mean_size, outside)
    if isinstance(head.cells, Weighted):
        n = int(head.cells.effective)
        low, high = coverage_band(n, len(rows), g.alpha, level=BAND)
    else:
        low, high = band(scores, len(rows), g.alpha, BAND)
    return Level(name, len(rows), covered, low, high, low <= covered <= high, mean_size)


def band(scores: Array, rows: int, alpha: float, level: float) -> tuple[float, float]:
    """Where the coverage of so many rows lies with probability ``level``, for the threshold among
    ascending ``scores`` n.

    Scores that tie at the threshold are all covered. Told apart by chance they would lie below the
    next rank, whose band has the upper end then.
    """
    n = len(scores)
    low, high = coverage_band(n, rows, alpha, level=level)
    if conformal_rank(n, alpha) > n:
        return low, high
    covered = int(np.searchsorted(scores, threshold_at(scores, alpha), side="right"))
    if covered > conformal_rank(n, alpha):
        rank = covered + 1
        high = 1.0 if rank > n else coverage_band(n, rows, 1 - rank / (n + 1), level=level)[1]
    return low, high


def _outside(known: Cells, g: Guarantee, rows: Labelled, inside: Array) -> tuple[str, ...]:
    """The cells whose coverage is not what chance allows. Of rows without a cell, such as those of
    a new group, nothing is promised by themselves."""
    cell = members(known, rows)
    starts = np.cumsum(known.counts) - known.counts
    there = [c for c in np.unique(cell).tolist() if c != UNKNOWN]
    found = []
    for c in there:
        own, scores = inside[cell == c], known.scores[starts[c] : starts[c] + known.counts[c]]
        low, high = band(scores, len(own), g.alpha, 1 - (1 - BAND) / len(there))
        share = float(own.mean())
        if not low <= share <= high:
            name = known.names[c]
            found.append(f"{name}: {share:.3f} of {len(own)}, {low:.3f} to {high:.3f}")
    return tuple(found)
