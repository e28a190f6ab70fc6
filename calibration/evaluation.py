"""Evaluate predictions on test rows: every figure of the report, computed from arrays.

The arrays come from the fused graph itself, so that what is measured is what is served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from calibration.metrics.bootstrap import Estimate, mean_estimates, paired_difference
from calibration.metrics.calibration_error import debiased_ece, ece_difference, perfect_band
from calibration.metrics.coverage import coverage_band, set_sizes
from calibration.metrics.proper import brier_score, gaussian_crps, gaussian_log_loss
from calibration.metrics.ranking import aupr, auroc, auroc_estimate, fpr95, risk_coverage
from calibration.metrics.records import (
    Answered,
    Curve,
    Difference,
    Evaluation,
    Figure,
    Histogram,
    Level,
    OodResult,
    Quantiles,
    Reliability,
    SetSizes,
    System,
    WidthGroup,
)
from calibration.metrics.regression import (
    gaussian_pit,
    observed_quantiles,
    pce_floor,
    pit_totals,
)
from calibration.metrics.totals import (
    ClassificationTotals,
    RegressionTotals,
    level_name,
    update_classification,
    update_regression,
)
from posthoc.contract import F64, I64, Array, DataError
from posthoc.folds import class_index, log_loss_of_probs, run

FROZEN, SCALED, HEDGED = "frozen", "temperature scaled", "hedged"
CONSTANT = "constant error bar"
_CURVE_POINTS = 200
_SCORE_BINS = 40


def evaluate_classification(
    *,
    frozen_probs: Array,
    scaled_probs: Array,
    fields: Mapping[str, Array],
    y: Array,
    sets: Mapping[float, Array],
    n_conformal: int,
    ood_in: Mapping[str, Array] | None = None,
    ood_out: Mapping[str, Mapping[str, Array]] | None = None,
    groups: Array | None = None,
    about: Mapping[str, str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Frozen, temperature-scaled and hedged probabilities of the same N test rows, compared.

    ``frozen_probs`` and ``scaled_probs`` are N×C; ``fields`` holds the hedged prediction by the
    names of ``posthoc.contract.Classification`` (label, probs and confidence at least; abstain
    and ood are used where present); ``y`` N true classes; ``sets`` N×C masks by alpha, made with
    ``n_conformal`` conformal rows, the default level first; ``ood_in`` N scores by score name and
    ``ood_out`` the same scores by name of a strange set; ``groups`` N ids of rows that are no
    independent evidence. Raises DataError where lengths differ or a label is no class.
    """
    truth = class_index(y, np.shape(frozen_probs)[1])
    label = np.argmax(frozen_probs, axis=1)
    rows = {
        FROZEN: (label, _at(frozen_probs, label), frozen_probs),
        SCALED: (label, _at(scaled_probs, label), scaled_probs),
        HEDGED: (fields["label"], fields["confidence"], fields["probs"]),
    }
    losses = {n: _class_losses(lab, probs, truth) for n, (lab, _, probs) in rows.items()}
    systems = tuple(
        _classifier(name, lab, conf, probs, truth, losses[name], groups, n_boot, seed)
        for name, (lab, conf, probs) in rows.items()
    )
    rating = {n: (conf, np.asarray(lab) == truth) for n, (lab, conf, _) in rows.items()}
    differences = [
        d
        for other in (SCALED, FROZEN)
        for d in (
            *_differences(losses, ("nll", "brier"), other, groups, n_boot, seed),
            _difference(
                "debiased_ece",
                other,
                ece_difference(
                    rating[HEDGED], rating[other], groups=groups, n_boot=n_boot, seed=seed
                ),
            ),
        )
    ]
    sizes = {alpha: run(set_sizes(mask.shape[1]), [{"set": mask, "y": truth}])
             for alpha, mask in sets.items()}  # fmt: skip
    covered = {a: np.asarray(mask)[np.arange(len(truth)), truth] for a, mask in sets.items()}
    ood, scores = _ood(ood_in or {}, ood_out or {}, groups)
    return Evaluation(
        task="classification",
        about=dict(about or {}),
        n=len(truth),
        n_conformal=n_conformal,
        label_equal=float((np.asarray(fields["label"]) == label).mean()),
        systems=systems,
        differences=tuple(differences),
        levels=tuple(
            _level(a, t.coverage, t.mean_size, len(truth), n_conformal, t.empty_share)
            for a, t in sizes.items()
        ),
        set_sizes=tuple(
            SetSizes(
                level=level_name(a),
                size=tuple(t.coverage_by_size),
                count=tuple(int(t.count[s]) for s in t.coverage_by_size),
                coverage=tuple(t.coverage_by_size.values()),
            )
            for a, t in sizes.items()
        ),
        answered=_answered(fields, covered, rating[HEDGED][1]),
        ood=ood,
        scores=scores,
    )


def evaluate_regression(
    *,
    fields: Mapping[str, Array],
    constant_std: Array | float,
    y: Array,
    intervals: Mapping[float, tuple[Array, Array]],
    n_conformal: int,
    quantile_levels: Sequence[float] = (),
    ood_in: Mapping[str, Array] | None = None,
    ood_out: Mapping[str, Mapping[str, Array]] | None = None,
    groups: Array | None = None,
    about: Mapping[str, str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """The hedged predictive distribution beside the frozen mean with one error bar for all rows.

    ``fields`` holds the hedged prediction by the names of ``posthoc.contract.Regression`` (mean
    and std N×K at least; quantiles N×K×Q with ``quantile_levels``); ``constant_std`` (K) is the
    standard deviation of the frozen model's residuals on calibration rows; ``y`` N×K (or N);
    ``intervals`` lower and upper N×K by alpha, the default level first. The rest as for
    classification. PIT and PCE are of the Gaussian (mean, std), over rows and outputs.
    """
    truth = _columns(y)
    mean, std = _columns(fields["mean"]), _columns(fields["std"])
    constant = np.broadcast_to(np.asarray(constant_std, dtype=np.float64), truth.shape)
    losses = {
        n: {
            "squared_error": ((truth - mean) ** 2).mean(axis=1),
            "mae": np.abs(truth - mean).mean(axis=1),
            "crps": gaussian_crps(truth - mean, s).mean(axis=1),
            "nll": gaussian_log_loss(truth - mean, s).mean(axis=1),
        }
        for n, s in ((CONSTANT, constant), (HEDGED, std))
    }
    systems = tuple(
        _regressor(n, losses[n], gaussian_pit(mean, s, truth), groups, n_boot, seed)
        for n, s in ((CONSTANT, constant), (HEDGED, std))
    )
    levels, covered = [], {}
    for alpha, (lower, upper) in intervals.items():
        low, high = _columns(lower), _columns(upper)
        name = level_name(alpha)
        totals = update_regression(
            RegressionTotals(), mean=mean, std=std, y=truth, lower=low, upper=high, level=name
        ).levels[name]
        levels.append(
            _level(alpha, totals.coverage, totals.mean_size, len(truth), n_conformal, None)
        )
        covered[alpha] = ((low <= truth) & (truth <= high)).all(axis=1)
    widths, width_groups = None, ()
    if intervals:
        alpha, (lower, upper) = next(iter(intervals.items()))
        width = (_columns(upper) - _columns(lower)).mean(axis=1)
        if np.isfinite(width).all():
            widths = _histogram(f"width at level {level_name(alpha)}", {"test rows": width})
            width_groups = _by_width(width, covered[alpha])
    quantiles = fields.get("quantiles") if quantile_levels else None
    ood, scores = _ood(ood_in or {}, ood_out or {}, groups)
    return Evaluation(
        task="regression",
        about=dict(about or {}),
        n=len(truth),
        n_conformal=n_conformal,
        systems=systems,
        differences=tuple(_differences(losses, ("nll", "crps"), CONSTANT, groups, n_boot, seed)),
        levels=tuple(levels),
        widths=widths,
        width_groups=width_groups,
        quantiles=None
        if quantiles is None
        else Quantiles(
            level=tuple(quantile_levels),
            observed=tuple(
                observed_quantiles(
                    np.reshape(quantiles, (*truth.shape, -1)), quantile_levels, truth
                ).tolist()
            ),
        ),
        pce_floor=pce_floor(truth.size),
        answered=_answered(fields, covered, None),
        ood=ood,
        scores=scores,
    )


def _class_losses(label: Array, probs: Array, y: I64) -> dict[str, F64]:
    return {
        "accuracy": (np.asarray(label) == y).astype(np.float64),
        "nll": log_loss_of_probs(probs, y),
        "brier": brier_score(probs, y),
    }


def _classifier(
    name: str,
    label: Array,
    confidence: Array,
    probs: Array,
    y: I64,
    losses: Mapping[str, F64],
    groups: Array | None,
    n_boot: int,
    seed: int,
) -> System:
    totals = update_classification(
        ClassificationTotals(), confidence=confidence, label=label, y=y, probs=probs
    )
    band = perfect_band(confidence, seed=seed)
    wrong = np.asarray(label) != y
    curve = risk_coverage(confidence, wrong)
    estimates = mean_estimates(losses, groups=groups, n_boot=n_boot, seed=seed)
    metrics = {metric: Figure(**asdict(e)) for metric, e in estimates.items()}
    metrics["ece"] = _against(totals.ece, band.ece)
    metrics["debiased_ece"] = _against(debiased_ece(totals), band.debiased_ece)
    metrics["aurc"], metrics["augrc"] = Figure(value=curve.aurc), Figure(value=curve.augrc)
    if 0 < wrong.sum() < len(wrong):
        c = np.asarray(confidence)
        metrics["error_auroc"] = Figure(value=auroc(-c[~wrong], -c[wrong]))
    filled = np.flatnonzero(totals.count)
    n = totals.count[filled]
    at = np.unique(np.linspace(0, len(curve.risk) - 1, _CURVE_POINTS).astype(np.int64))
    return System(
        name=name,
        metrics=metrics,
        reliability=Reliability(
            count=tuple(n.tolist()),
            confidence=tuple((totals.confidence_sum[filled] / n).tolist()),
            accuracy=tuple((totals.correct[filled] / n).tolist()),
            low=tuple(band.accuracy_low[filled].tolist()),
            high=tuple(band.accuracy_high[filled].tolist()),
        ),
        risk_coverage=Curve(x=tuple(curve.coverage[at].tolist()), y=tuple(curve.risk[at].tolist())),
    )


def _regressor(
    name: str,
    losses: Mapping[str, F64],
    pit: F64,
    groups: Array | None,
    n_boot: int,
    seed: int,
) -> System:
    estimates = mean_estimates(losses, groups=groups, n_boot=n_boot, seed=seed)
    squared = estimates["squared_error"]
    totals = run(pit_totals, [pit])
    metrics = {
        "rmse": Figure(**{k: math.sqrt(v) for k, v in asdict(squared).items()}),
        **{m: Figure(**asdict(e)) for m, e in estimates.items() if m != "squared_error"},
        "pce": Figure(value=totals.pce),
    }
    return System(name=name, metrics=metrics, pit=tuple(totals.count.tolist()))


def _against(value: float, band: tuple[float, float]) -> Figure:
    return Figure(value=value, low=band[0], high=band[1], range="perfect")


def _difference(metric: str, other: str, e: Estimate) -> Difference:
    return Difference(metric=metric, of=HEDGED, to=other, **asdict(e))


def _differences(
    losses: Mapping[str, Mapping[str, F64]],
    metrics: Sequence[str],
    other: str,
    groups: Array | None,
    n_boot: int,
    seed: int,
) -> list[Difference]:
    return [
        _difference(
            metric,
            other,
            paired_difference(
                losses[HEDGED][metric],
                losses[other][metric],
                groups=groups,
                n_boot=n_boot,
                seed=seed,
            ),
        )
        for metric in metrics
    ]


def _level(
    alpha: float,
    coverage: float,
    mean_size: float,
    n: int,
    n_conformal: int,
    empty_share: float | None,
) -> Level:
    low, high = coverage_band(n_conformal, n, alpha)
    return Level(
        level=level_name(alpha),
        alpha=alpha,
        coverage=coverage,
        band_low=low,
        band_high=high,
        mean_size=mean_size if math.isfinite(mean_size) else None,
        empty_share=empty_share,
    )


def _answered(
    fields: Mapping[str, Array], covered: Mapping[float, Array], right: Array | None
) -> Answered | None:
    """What is left once the flagged and the abstained rows are set aside; None without either."""
    held = [np.asarray(fields[f], dtype=bool) for f in ("abstain", "ood") if f in fields]
    if not held:
        return None
    kept = ~np.logical_or.reduce(held)
    if not kept.any():
        return Answered(share=0.0)
    alpha = next(iter(covered), None)
    return Answered(
        share=float(kept.mean()),
        error=None if right is None else float((~np.asarray(right))[kept].mean()),
        level=None if alpha is None else level_name(alpha),
        coverage=None if alpha is None else float(covered[alpha][kept].mean()),
    )


def _ood(
    ood_in: Mapping[str, Array],
    ood_out: Mapping[str, Mapping[str, Array]],
    groups: Array | None,
) -> tuple[tuple[OodResult, ...], tuple[Histogram, ...]]:
    results = [
        OodResult(
            score=score,
            out=out,
            n_out=len(values[score]),
            auroc=Figure(**asdict(auroc_estimate(inside, values[score], negative_groups=groups))),
            aupr=aupr(inside, values[score]),
            fpr95=fpr95(inside, values[score]),
        )
        for score, inside in ood_in.items()
        for out, values in ood_out.items()
        if score in values
    ]
    histograms = [
        _histogram(
            score,
            {
                "test rows": inside,
                **{out: values[score] for out, values in ood_out.items() if score in values},
            },
        )
        for score, inside in ood_in.items()
    ]
    return tuple(results), tuple(histograms)


def _histogram(name: str, sets: Mapping[str, Array]) -> Histogram:
    """Shares over common bins that span the middle 99 % of each set; the ends hold the rest."""
    values = {n: np.asarray(v, dtype=np.float64) for n, v in sets.items()}
    ends = np.array([np.quantile(v, [0.005, 0.995]) for v in values.values()])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    if not low < high:
        low, high = low - 0.5, low + 0.5
    edges = np.linspace(low, high, _SCORE_BINS + 1)
    return Histogram(
        name=name,
        edges=tuple(edges.tolist()),
        shares={
            n: tuple((np.histogram(np.clip(v, low, high), edges)[0] / len(v)).tolist())
            for n, v in values.items()
        },
    )


def _by_width(width: F64, covered: Array) -> tuple[WidthGroup, ...]:
    parts = [p for p in np.array_split(np.argsort(width, kind="stable"), 5) if len(p)]
    return tuple(
        WidthGroup(
            mean_width=float(width[p].mean()), coverage=float(covered[p].mean()), count=len(p)
        )
        for p in parts
    )


def _at(probs: Array, label: I64) -> Array:
    return np.asarray(probs)[np.arange(len(label)), label]


def _columns(x: Array) -> F64:
    a = np.asarray(x, dtype=np.float64)
    if a.ndim not in (1, 2):
        raise DataError(f"a regression of rows and outputs was given shape {a.shape}")
    return a[:, None] if a.ndim == 1 else a
