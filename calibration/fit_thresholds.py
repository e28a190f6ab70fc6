"""Thresholds by rank: conformal sets and intervals, the OOD flag, abstention.

Ranks are taken from the compiled graph's own float32 scores, because that graph is what will be
compared with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from calibration.bundle import (
    AbstainRecord,
    ConformalRecord,
    FittedRecord,
    Guarantee,
    OodRecord,
    conformal_rank,
    threshold_at,
)
from calibration.compile import compile_head
from calibration.conformal.cells import Cells, cells, group_codes, group_index
from calibration.conformal.clusters import fit_clusters
from calibration.conformal.intervals import (
    Interval,
    interval_scores,
    signed_residuals,
)
from calibration.conformal.risk import RiskPromise, control_risk
from calibration.families.choice import Gain
from calibration.fit_ood import flag
from calibration.fit_options import FitOptions, Parts
from calibration.head import Head
from calibration.recalibration import TRANSFORMS, base_of, factors, recalibrate
from calibration.scaling import Scaling
from calibration.shift.class_shift import class_weights
from calibration.shift.density_ratio import check_overlap, fit_density_ratio
from calibration.shift.retasa import retasa
from calibration.shift.weighted import Weighted, weighted
from calibration.threshold import fit_abstention, neyman_pearson_rows
from posthoc import links
from posthoc import rows as blocks_of
from posthoc.contract import F64, Array, Features, FitError
from posthoc.runtime import open_session

_NUMBERS = 4_000_000  # N×S×C of one run of the compiled head


@dataclass(frozen=True, slots=True)
class Fitted:
    """A calibrated head, the records of its manifest and its sorted conformal scores."""

    head: Head
    module: FittedRecord
    scaling: Scaling
    conformal: ConformalRecord
    ood: OodRecord | None
    abstain: AbstainRecord | None
    scores: dict[str, Array]
    gains: tuple[Gain, ...] = ()  # of the families that were tried


def run_head(
    head: Head, rows: Features, *, group: Array | None = None, u: Array | None = None
) -> dict[str, Array]:
    """Every output of the compiled head, ``set_scores`` included, on cached rows in float32;
    ``group`` and ``u`` are those of the rows, where the head takes them.

    Blocks are so small that the draws of one, N×S×C, are at most a few million numbers.
    """
    session = open_session(compile_head(head, scores=True))
    names = [o.name for o in session.get_outputs()]
    made: dict[str, list[Array]] = {n: [] for n in names}
    numbers = head.width * (links.N_DRAWS if head.eps is None else len(head.eps))
    beside = _beside(head, group, u)
    start = 0
    for block in blocks_of.of(rows, min(blocks_of.BLOCK, max(16, _NUMBERS // numbers))):
        feed = {"z": np.asarray(block.z, np.float32)}
        if head.features is not None:
            feed["phi"] = np.asarray(block.phi, np.float32)
        feed |= {k: v[start : start + len(block)] for k, v in beside.items()}
        start += len(block)
        for name, value in zip(names, session.run(names, feed), strict=True):
            made[name].append(value)
    return {n: np.concatenate(v) for n, v in made.items()}


def _beside(head: Head, group: Array | None, u: Array | None) -> dict[str, Array]:
    """The run-time inputs of rows."""
    found: dict[str, Array] = {}
    if group is not None and isinstance(head.cells, Cells) and head.cells.by == "group":
        found["group"] = np.asarray(group, np.int64)
    if u is not None and head.randomised:
        found["u"] = np.asarray(u, np.float32)
    return found


def fit_thresholds(head: Head, parts: Parts, options: FitOptions, scaling: Scaling) -> Fitted:
    """Ranks of the conformal rows, by the compiled head."""
    rows = parts.conformal
    assert rows.y is not None
    whole = options.task == "regression" and head.interval != Interval()
    apart = options.given is not None or options.randomised or options.shift is not None
    if parts.per > 1 and (apart or whole):
        raise FitError(
            "what is promised of maps is a share of an image's pixels: leave --given, --shift, "
            "--randomised and --side out and, for a regression, --conformal"
        )
    out = run_head(head, rows, u=parts.u)
    scores: dict[str, Array] = {}
    if head.task == "classification":
        true = out["set_scores"][np.arange(len(rows)), np.asarray(rows.y, np.int64)]
        exact = true
        scores["set"] = sorted_scores = np.sort(true)
        sureness: Literal["confidence", "std"] = "confidence"
    else:
        y = np.asarray(rows.y, np.float64)
        if not (np.isfinite(out["std"]) & (out["std"] > 0)).all():
            raise FitError(
                "a standard deviation is 0 or infinite in float32: the targets' unit is too small "
                "or too large for it; rescale the targets and the model's output"
            )
        exact = interval_scores(head.interval, y, out["mean"], out["std"])
        # The graph compares in float32: round up, so that a covered row stays covered.
        scores["interval"] = sorted_scores = np.sort(_float32_up(exact))
        signed, base = signed_residuals(y, out["mean"], out["std"]), base_of(head)
        maps = recalibrate(options.recalibration, base, signed)
        levels = np.asarray(options.quantile_levels)
        head = head.with_(quantile_factors=factors(base, maps, signed, levels))
        if options.recalibration == "kde" and parts.per == 1:
            scores[TRANSFORMS] = np.stack([m.z for m in maps])
        sureness = "std"
    wrong = _wrong(out, rows, options)
    if parts.per > 1:
        key = "set" if head.task == "classification" else "interval"
        scores[key] = _float32_up(exact).reshape(-1, parts.per)
        guarantees = tuple(map(promise, control_risk(scores[key], options.alphas)))
        # What follows ranks items: one drawn pixel stands for its image.
        out = {k: v[:: parts.per] for k, v in out.items()}
        wrong = wrong[:: parts.per]
    else:
        guarantees = tuple(guarantee(sorted_scores, a) for a in options.alphas)
    if head.task == "regression":
        for g in guarantees:
            if g.threshold is None:
                raise FitError(
                    f"an interval at alpha {g.alpha} needs at least {g.n_needed} conformal "
                    f"{'rows' if parts.per == 1 else 'images'}; there are {g.n}"
                )
    q = guarantees[0].threshold
    head = head.with_(q_hat=math.inf if q is None else q)
    shift = None
    if options.shift is not None:
        by_weight = _weighted(head, parts, options, exact)
        head = head.with_(cells=by_weight, q_hat=by_weight.thresholds(options.alphas[0]))
        if by_weight.ratio is not None and by_weight.ratio.centre is not None:
            head = head.with_(features=len(by_weight.ratio.centre))  # the weights read them
        scores |= by_weight.tensors()
        shift = {
            "effective_rows": by_weight.effective,
            "production_rows": 0.0 if parts.production is None else float(len(parts.production)),
        }
        guarantees = tuple(g.model_copy(update={"threshold": None}) for g in guarantees)
    if options.given is not None:
        own = scores["set"] if head.task == "classification" else scores["interval"]
        ranked = exact if head.task == "classification" else _float32_up(exact)
        by = _cells(head, parts, options, ranked.astype(own.dtype))
        head = head.with_(cells=by, q_hat=by.thresholds(options.alphas[0]))
        scores |= by.tensors()
        guarantees = tuple(g.model_copy(update={"cells": by.records(g.alpha)}) for g in guarantees)
    ood_record = None
    if head.ood is not None:
        scores["ood"] = np.sort(out["ood_score"])
        found, ood_record = flag(head.ood, scores["ood"], options.ood_alpha, options.ood_delta)
        head = head.with_(ood=found)
    abstain = None
    if head.abstains:
        seen = run_head(head, parts.calibration)
        grid, failed = seen[sureness][:: parts.per], _wrong(seen, parts.calibration, options)
        failed = failed[:: parts.per]
        sure = out[sureness]
        if sureness == "std":
            grid, sure = -grid.max(1), -sure.max(1)
        head, abstain = _abstain(head, (grid, failed), sure, wrong, options)
    module = FittedRecord(name="none")
    if head.module is not None:
        module = FittedRecord(name=head.module[0], settings=dict(head.module[1].settings))
    settings: dict[str, Any] = dict(head.conformal_settings)
    method = head.conformal if head.task == "classification" else head.interval.method
    if head.task == "regression" and head.interval.side != "two":
        settings["side"] = head.interval.side
    if head.interval.margin:
        settings["margin"] = head.interval.margin
    conformal = ConformalRecord(
        method=method,
        settings=settings,
        guarantees=guarantees,
        given=options.given,
        shift=options.shift,
        weights=shift or {},
        randomised=head.randomised,
    )
    return Fitted(head, module, scaling, conformal, ood_record, abstain, scores)


def _weighted(head: Head, parts: Parts, options: FitOptions, exact: Array) -> Weighted:
    """The conformal scores with weights that make them look like production rows."""
    new = parts.production
    if new is None or len(new) == 0:
        raise FitError("--shift needs production rows without labels: name them with --production")
    assert options.shift is not None
    seen, own = parts.calibration, np.zeros(0)
    scores = exact if head.task == "classification" else _float32_up(exact)
    if options.shift == "covariate":
        both = None if seen.phi is None or new.phi is None else (seen.phi, new.phi)
        t = head.temperature if head.task == "classification" else None
        ratio = fit_density_ratio(seen.z, new.z, options.seed, temperature=t, features=both)
        weights = ratio.weights(parts.conformal.z, parts.conformal.phi)
        check_overlap(float(weights.mean()))
        return weighted(options.shift, scores.astype(np.float32), weights, own, ratio)
    if head.task == "classification":
        y = np.asarray(seen.y, np.int64)
        plain = head.with_(ood=None, abstains=False)
        p, fresh = (run_head(plain, rows)["probs"].astype(np.float64) for rows in (seen, new))
        own = class_weights(p, y, fresh)
        weights = own[np.asarray(parts.conformal.y, np.int64)]
    else:
        if head.width > 1:
            raise FitError(f"--shift target is for one target and this model has {head.width}")
        truth, rows = np.asarray(seen.y, np.float64)[:, 0], parts.conformal
        known = retasa(seen.z[:, 0], truth, new.z[:, 0], options.seed)
        order = np.argsort(truth, kind="stable")
        weights = np.interp(np.asarray(rows.y, np.float64)[:, 0], truth[order], known[order])
        own = np.asarray([weights.max()])
    return weighted(options.shift, scores.astype(np.float32), weights, own)


def _cells(head: Head, parts: Parts, options: FitOptions, scores: Array) -> Cells:
    """The conformal scores by class, cluster of classes or group."""
    if options.given == "group":
        if parts.groups is None:
            raise FitError("--given group needs the column of groups: name it with --group")
        codes, of, names = group_codes(parts.groups)
        return cells("group", scores, group_index(of, codes), of, names)
    y = np.asarray(parts.conformal.y, np.int64)
    if options.given == "class":
        every = np.arange(head.width)
        return cells("class", scores, y, every, [str(c) for c in every])
    seen = parts.calibration
    known = np.asarray(seen.y, np.int64)
    their = run_head(head, seen)["set_scores"][np.arange(len(seen)), known]
    of = fit_clusters(their, known, head.width, min(options.alphas))
    return cells("cluster", scores, of[y], of, [str(c) for c in range(int(of.max()) + 1)])


def guarantee(sorted_scores: Array, alpha: float) -> Guarantee:
    """What the threshold of n ascending scores promises at level 1 - alpha."""
    n = len(sorted_scores)
    q = threshold_at(sorted_scores, alpha)
    return Guarantee(
        alpha=alpha,
        n=n,
        rank=conformal_rank(n, alpha),
        threshold=None if math.isinf(q) else q,
        n_needed=math.ceil(round(1 / alpha, 9)) - 1,
    )


def promise(risk: RiskPromise, kind: Literal["risk", "missed"] = "risk") -> Guarantee:
    """What a controlled risk promises, for the manifest."""
    return Guarantee(
        alpha=risk.alpha,
        n=risk.n,
        rank=0,
        kind=kind,
        threshold=None if math.isinf(risk.threshold) else risk.threshold,
        n_needed=risk.n_needed,
    )


def _wrong(out: Mapping[str, Array], rows: Features, options: FitOptions) -> Array:
    """Which answers are wrong: another class, or an error beyond the tolerance."""
    if options.task == "classification":
        return np.asarray(out["label"] != rows.y)
    error = np.abs(np.asarray(rows.y, np.float64) - out["mean"]).max(1)
    return np.asarray(error > (options.tolerance or math.inf))


def _abstain(
    head: Head, grid: tuple[Array, Array], sure: Array, wrong: Array, options: FitOptions
) -> tuple[Head, AbstainRecord]:
    assert options.max_error is not None
    # A standard deviation has no upper end; the manifest holds no infinity and the graph float32.
    least = -1.0 if head.task == "classification" else float(np.finfo(np.float32).min)
    found = fit_abstention(
        grid[0],
        sure,
        wrong,
        options.max_error,
        options.error_delta,
        least=least,
        grid_wrong=grid[1],
    )
    record = AbstainRecord(
        max_error=options.max_error,
        delta=options.error_delta,
        n=len(sure),
        n_needed=neyman_pearson_rows(options.max_error, options.error_delta),
        threshold=found.threshold,
        answered=found.answered,
    )
    return head.with_(abstain=found.threshold), record


def _float32_up(values: F64) -> Array:
    """The smallest float32 at or above each value."""
    low = values.astype(np.float32)
    return np.where(low < values, np.nextafter(low, np.float32(np.inf)), low)
