"""New thresholds by rank among fresh rows: sets, intervals, quantiles and abstention.

Scores are computed from what was served by the very operators of the graph. At a factor of 1 they
are the served ones; behind a new factor the graph starts from logits and these from float32
probabilities, so that they differ by rounding: thresholds are put outward by more than that, lest
equal rows at the threshold all fall out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from calibration.bundle import (
    AbstainRecord,
    ConformalRecord,
    Manifest,
)
from calibration.conformal.cells import UNKNOWN, Cells, cells, group_index
from calibration.conformal.intervals import interval_scores, make, signed_residuals
from calibration.conformal.scores import choose, emit_class_scores
from calibration.families import apply_family, fit_family
from calibration.fit_thresholds import guarantee
from calibration.head import Head, right_or_wrong
from calibration.recalibration import TRANSFORMS, base_of, factors, knots, recalibrate
from calibration.renew.factor import tempered_probs
from calibration.renew.rows import Labelled, drawn
from calibration.threshold import fit_abstention, neyman_pearson_rows
from posthoc.contract import F64, I64, Array, FitError
from posthoc.graph import HEAD_OPSET, Fragment, standalone
from posthoc.runtime import open_session

_ROUNDING = 2.0**-18  # of a score, relative: log p in float32, over a temperature, and back
_BLOCK = 2_000_000  # numbers N×C in one run


@dataclass(frozen=True, slots=True)
class Ranked:
    """A head with new thresholds, their records, and its sorted conformal scores."""

    head: Head
    conformal: ConformalRecord
    abstain: AbstainRecord | None
    scores: dict[str, Array]


def served(rows: Labelled, t: float) -> Labelled:
    """The rows as they would have been served behind the factor t, but for the confidence of a
    family of its own (`confidences`)."""
    if rows.probs is not None:
        p = tempered_probs(rows.probs, t)
        sure = rows.confidence if t == 1.0 else p[np.arange(len(p)), np.asarray(rows.label)]
        return dataclasses.replace(rows, probs=p, confidence=sure)
    assert rows.std is not None
    return dataclasses.replace(rows, std=(rows.std * t).astype(np.float32))


def confidences(head: Head, rows: Labelled) -> F64:
    """The confidence N that a head with ``sureness`` gives rows."""
    assert head.sureness is not None and rows.label is not None and rows.probs is not None
    both = right_or_wrong(rows.probs, rows.label)
    return np.asarray(np.exp(apply_family(head.sureness, both))[:, 1])


def chosen_again(head: Head, rows: Labelled, alphas: tuple[float, ...]) -> Head:
    """The head with what scaling rows (as they are served now) choose: the settings of a score,
    the knots of an interval, the family of its confidence."""
    if head.task == "classification":
        assert rows.probs is not None and rows.label is not None
        y = np.asarray(rows.y, np.int64)
        settings = choose(head.conformal, rows.probs.astype(np.float64), y, alphas[0])
        head = head.with_(conformal_settings=settings)
        if head.sureness is not None:
            right = (rows.label == y).astype(np.int64)
            both = right_or_wrong(rows.probs, rows.label)
            head = head.with_(sureness=fit_family(head.sureness.name, both, right))
        return head
    own = head.interval
    if own.method != "cdf":
        return head
    assert rows.mean is not None and rows.std is not None and head.noise is not None
    found = knots(base_of(head), signed_residuals(rows.y, rows.mean, rows.std))
    return head.with_(interval=make("cdf", own.side, head.noise, own.margin, found))


def scores_of(head: Head, rows: Labelled, u: Array) -> Iterator[tuple[slice, Array]]:
    """Conformal scores of every class, block by block, from served probabilities; ``u`` N."""
    g = Fragment(HEAD_OPSET)
    p = g.input("p", "float32", ["N", head.width])
    drawn_u = g.input("u", "float32", ["N"]) if head.randomised else None
    top = g.op("ArgMax", p, axis=1, keepdims=0)
    name = emit_class_scores(
        g, head.conformal, head.conformal_settings, p, top, head.width, drawn_u
    )
    g.publish(name, "scores")
    session = open_session(standalone(g, {"scores": ("float32", (-1, head.width))}))
    assert rows.probs is not None
    step = max(1, _BLOCK // head.width)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        feed = {"p": rows.probs[part]}
        if head.randomised:
            feed["u"] = np.asarray(u[part], np.float32)
        yield part, session.run(["scores"], feed)[0]


def true_scores(head: Head, rows: Labelled, u: Array) -> Array:
    """Conformal scores N of the truth, as the graph compares them."""
    if head.task == "regression":
        assert rows.mean is not None and rows.std is not None
        return interval_scores(head.interval, rows.y, rows.mean, rows.std)
    found = np.empty(len(rows), np.float32)
    for part, s in scores_of(head, rows, u):
        found[part] = s[np.arange(len(s)), rows.y[part]]
    return found


def ranked(
    head: Head,
    manifest: Manifest,
    rows: Labelled,
    *,
    moved: bool,
    seed: int,
    grid: tuple[Array, Array | None] | None,
    tolerance: float | None = None,
) -> Ranked:
    """Thresholds from conformal ``rows``, as they are served behind the new factor; ``moved`` says
    that there is one. ``grid`` holds confidences (regression: negative deviations) of other rows,
    and where known which of them were wrong, that abstention may be tried at; None: it stays. A
    regression is wrong where its error is above ``tolerance``.

    Raises FitError for an interval or a quantile that takes more rows than there are.
    """
    classes = head.task == "classification"
    exact = np.asarray(true_scores(head, rows, drawn(rows, seed)), np.float64)
    if moved:
        exact = exact + np.abs(exact) * _ROUNDING
    score = float32_up(exact)
    key = "set" if classes else "interval"
    scores: dict[str, Array] = {key: np.sort(score)}
    if not classes:
        head, more = _quantiles(head, manifest, rows)
        scores |= more
    alphas = manifest.alphas
    guarantees = tuple(guarantee(scores[key], a) for a in alphas)
    if not classes and any(g.threshold is None for g in guarantees):
        g = next(g for g in guarantees if g.threshold is None)
        raise FitError(
            f"an interval at alpha {g.alpha} needs at least {g.n_needed} conformal rows; "
            f"there are {g.n}"
        )
    q, known = guarantees[0].threshold, head.cells
    head = head.with_(cells=None, q_hat=math.inf if q is None else q)
    old = manifest.conformal
    if isinstance(known, Cells):
        by = cells(known.by, score, members(known, rows), known.of, known.names)
        head = head.with_(cells=by, q_hat=by.thresholds(alphas[0]))
        scores |= by.tensors()
        guarantees = tuple(g.model_copy(update={"cells": by.records(g.alpha)}) for g in guarantees)
    settings = dict(old.settings)
    if classes:
        settings = dict(head.conformal_settings)
    record = old.model_copy(
        update={"settings": settings, "guarantees": guarantees, "shift": None, "weights": {}}
    )
    abstain = manifest.abstain
    if abstain is not None and grid is not None:
        head, abstain = _abstain(head, abstain, grid, rows, tolerance)
    return Ranked(head, record, abstain, scores)


def members(known: Cells, rows: Labelled) -> I64:
    """The cell of each of N rows: of its class, or its group; UNKNOWN for one that has none."""
    if known.by != "group":
        return np.asarray(known.of[np.asarray(rows.y, np.int64)])
    found = group_index(known.of, rows.group)
    return np.where(found < len(known.of), found, UNKNOWN)


def wrong(rows: Labelled, tolerance: float | None) -> Array:
    """Which of N answers were wrong: another class, or an error above the tolerance."""
    if rows.label is not None:
        return np.asarray(rows.label != rows.y)
    assert rows.mean is not None and tolerance is not None
    return np.asarray(np.abs(rows.y - rows.mean.astype(np.float64)).max(1) > tolerance)


def sureness(rows: Labelled) -> F64:
    """What abstention compares, N: the confidence, or less the largest standard deviation."""
    if rows.confidence is not None:
        return np.asarray(rows.confidence, np.float64)
    assert rows.std is not None
    return np.asarray(-rows.std.max(1), np.float64)


def float32_up(values: Array) -> Array:
    """The smallest float32 at or above each value: the graph compares in float32."""
    low = np.asarray(values).astype(np.float32)
    return np.where(low < values, np.nextafter(low, np.float32(np.inf)), low)


def _quantiles(head: Head, manifest: Manifest, rows: Labelled) -> tuple[Head, dict[str, Array]]:
    """The head with new quantiles, and the transforms that a density needs."""
    kind = manifest.recalibration
    if kind not in ("emp", "linear", "kde"):
        raise FitError(f"quantiles made by {kind!r} are unknown here; upgrade hedged")
    assert rows.mean is not None and rows.std is not None
    base, signed = base_of(head), signed_residuals(rows.y, rows.mean, rows.std)
    maps = recalibrate(kind, base, signed)  # type: ignore[arg-type]  # a text there
    found = factors(base, maps, signed, np.asarray(manifest.quantile_levels))
    more = {TRANSFORMS: np.stack([m.z for m in maps])} if kind == "kde" else {}
    return head.with_(quantile_factors=found), more


def _abstain(
    head: Head,
    old: AbstainRecord,
    grid: tuple[Array, Array | None],
    rows: Labelled,
    tolerance: float | None,
) -> tuple[Head, AbstainRecord]:
    # A standard deviation has no upper end; the manifest holds no infinity and the graph float32.
    least = -1.0 if head.task == "classification" else float(np.finfo(np.float32).min)
    found = fit_abstention(
        grid[0],
        sureness(rows),
        wrong(rows, tolerance),
        old.max_error,
        old.delta,
        least=least,
        grid_wrong=grid[1],
    )
    update = {
        "n": len(rows),
        "n_needed": neyman_pearson_rows(old.max_error, old.delta),
        "threshold": found.threshold,
        "answered": found.answered,
    }
    return head.with_(abstain=found.threshold), old.model_copy(update=update)
