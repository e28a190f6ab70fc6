"""Cells of coverage: of one split, method, level and, where a threshold is for a class, a cluster
of classes or a group, of each of these."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from bench.coverage_rows import Split
from calibration.bundle import threshold_at
from calibration.conformal.cells import UNKNOWN, Cells, cells, group_codes, group_index
from calibration.conformal.clusters import fit_clusters
from calibration.conformal.intervals import (
    INTERVALS,
    Side,
    bounds,
    interval_scores,
    make,
    signed_residuals,
)
from calibration.conformal.scores import METHODS, choose, class_scores, page
from calibration.recalibration import Base, knots
from posthoc.contract import Array

ALPHAS = (0.05, 0.1, 0.2)
SIDES: tuple[Side, ...] = ("two", "lower", "upper")
# Shown and not judged: the threshold of all rows within a group, and of rows of no known group.
MARGINAL, UNKNOWN_GROUP = ", within a group", ", unknown group"


@dataclass(frozen=True, slots=True)
class Cell:
    """``covered`` of ``m`` test rows by a threshold among ``n`` conformal ones; ``part`` names the
    class, cluster or group that both are of, "" all rows.

    ``lower``: only the lower edge of the band counts, because scores tie at the threshold or sets
    are never empty. ``size`` is the mean size of a set, or width of a two-sided interval.
    """

    method: str
    alpha: float
    part: str
    n: int
    m: int
    covered: int
    lower: bool
    size: float | None = None


def class_cells(split: Split, seed: int) -> Iterator[Cell]:
    """Sets of every score, deterministic and randomised, never empty, and by class, cluster and
    group."""
    known, new = split.conformal, split.test
    rng = np.random.default_rng(seed)
    u = rng.uniform(size=len(known)), rng.uniform(size=len(new))
    made: dict[str, tuple[Array, Array]] = {}
    for method in METHODS:
        for alpha in ALPHAS:
            settings = choose(method, split.calibration.p, split.calibration.y, alpha)
            for randomised in (False, True)[: 1 + page(method).RANDOMISES]:
                name = f"{method}, randomised" if randomised else method
                key = f"{name} {json.dumps(settings)}"
                if key not in made:
                    v = u if randomised else (1.0, 1.0)
                    s = class_scores(method, settings, known.p, v[0])
                    made[key] = (_true(s, known.y), class_scores(method, settings, new.p, v[1]))
                own, scores = made[key]
                q = threshold_at(np.sort(own), alpha)
                sets, true = scores <= q, _true(scores, new.y)
                yield _cell(name, alpha, own, true, q, size=float(sets.sum(1).mean()))
                if name == "lac":
                    filled = sets.copy()
                    filled[np.arange(len(new)), new.p.argmax(1)] = True
                    held, size = int(_true(filled, new.y).sum()), float(filled.sum(1).mean())
                    yield Cell("lac, never empty", alpha, "", len(own), len(new), held, True, size)
    own, true = (_true(class_scores("lac", {}, r.p), r.y) for r in (known, new))
    width = new.p.shape[1]
    seen = _true(class_scores("lac", {}, split.calibration.p), split.calibration.y)
    clusters = fit_clusters(seen, split.calibration.y, width, min(ALPHAS))
    for kind, of in (("class", np.arange(width)), ("cluster", clusters)):
        names = [str(i) for i in range(int(of.max()) + 1)]
        by = cells("class", own, of[known.y], of, names)
        thresholds = {a: by.thresholds(a)[new.y] for a in ALPHAS}
        yield from _parts(f"lac by {kind}", own, of[known.y], true, of[new.y], thresholds)
    yield from _group_cells("lac", split, own, true)


def value_cells(split: Split, seed: int) -> Iterator[Cell]:
    """Intervals of every score, two-sided and one-sided, and by group."""
    del seed
    known, new, base = split.conformal, split.test, Base()
    seen = split.calibration
    found = knots(base, signed_residuals(seen.y, seen.mean, seen.std))
    for method in INTERVALS:
        for side in SIDES:
            for alpha in ALPHAS:
                tail = alpha / 2 if side == "two" else alpha
                margin = float(base.quantile(np.asarray(1 - tail)))
                interval = make(method, side, split.noise, margin, found)
                own, true = (interval_scores(interval, r.y, r.mean, r.std) for r in (known, new))
                q = threshold_at(np.sort(own), alpha)
                low, high = bounds(interval, np.full((1, 1), q), new.mean, new.std)
                inside = np.asarray(((low <= new.y) & (new.y <= high)).all(1))
                width = float((high - low).mean()) if side == "two" else None
                name = method if side == "two" else f"{method}, {side}"
                cell = _cell(name, alpha, own, true, q, covered=inside, size=width)
                yield cell
    interval = make("residual", "two", split.noise, 0.0)
    own, true = (interval_scores(interval, r.y, r.mean, r.std) for r in (known, new))
    yield from _group_cells("residual", split, own, true)


def _group_cells(name: str, split: Split, own: Array, true: Array) -> Iterator[Cell]:
    """By group; beside it the marginal threshold, which groups that nobody knows must have."""
    known, new = split.conformal, split.test
    _, codes, names = group_codes(known.group)
    by = cells("group", own, group_index(codes, known.group), codes, names)
    place = group_index(codes, new.group)
    thresholds = {a: by.thresholds(a)[place] for a in ALPHAS}
    members = np.where(place < len(codes), place, UNKNOWN)
    here = group_index(codes, known.group)
    yield from _parts(f"{name} by group", own, here, true, members, thresholds)
    one = {a: np.full(len(true), threshold_at(by.every, a)) for a in ALPHAS}
    for part in _parts(f"{name}{MARGINAL}", own, here, true, members, one):
        yield replace(part, n=len(own))
    yield from _unknown(name, by, codes, own, true)


def _unknown(name: str, by: Cells, codes: Array, own: Array, true: Array) -> Iterator[Cell]:
    place = group_index(codes, np.full(len(true), UNKNOWN))
    for alpha in ALPHAS:
        q = by.thresholds(alpha)[place]
        held = int((true <= q).sum())
        yield Cell(f"{name}{UNKNOWN_GROUP}", alpha, "", len(own), len(true), held, False)


def _parts(
    name: str, own: Array, of: Array, true: Array, of_new: Array, thresholds: dict[float, Array]
) -> Iterator[Cell]:
    """A cell for each part that both samples have."""
    for part in np.intersect1d(of[of != UNKNOWN], of_new):
        mine, theirs = own[of == part], of_new == part
        for alpha, q in thresholds.items():
            limit = float(q[theirs][0])
            yield _cell(name, alpha, mine, true[theirs], limit, part=str(part))


def _cell(
    name: str,
    alpha: float,
    own: Array,
    true: Array,
    q: float,
    *,
    part: str = "",
    covered: Array | None = None,
    size: float | None = None,
) -> Cell:
    tied = int((own == q).sum()) + int((true == q).sum()) > 1
    held = int((true <= q if covered is None else covered).sum())
    finite = None if size is None or not np.isfinite(size) else size
    return Cell(name, alpha, part, len(own), len(true), held, tied, finite)


def _true(scores: Array, y: Array) -> Array:
    return np.asarray(scores[np.arange(len(y)), y])
