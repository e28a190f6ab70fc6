"""Evaluate means, error bars, intervals and scores on test rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from calibration.evaluation.examples import FIFTHS, fifths, furthest_off, spread_over
from calibration.evaluation.parts import (
    HEDGED,
    IN_ROWS,
    Named,
    Places,
    Resampling,
    against,
    answered,
    check_rows,
    differences,
    figures,
    histogram,
    independent,
    level,
    named_parts,
    ood_results,
    slice_part,
)
from calibration.evaluation.records import Evaluation, Figure, Quantiles, System, WidthGroup
from calibration.metrics.interval import interval_score
from calibration.metrics.perfect import N_SIM, perfect_ence
from calibration.metrics.proper import gaussian_crps, gaussian_log_loss
from calibration.metrics.regression import (
    gaussian_pit,
    observed_quantiles,
    pce_floor,
    perfect_pce,
    pit_totals,
)
from calibration.metrics.totals import level_name
from calibration.metrics.uce import expected_normalised_calibration_error
from posthoc.contract import F64, Array, DataError
from posthoc.folds import run

CONSTANT = "constant error bar"


def evaluate_regression(
    *,
    fields: Mapping[str, Array],
    y: Array,
    intervals: Mapping[float, tuple[Array, Array]],
    n_conformal: int,
    constant_std: Array | float | None = None,
    frozen_mean: Array | None = None,
    quantile_levels: Sequence[float] = (),
    ood_in: Mapping[str, Array] | None = None,
    ood_out: Mapping[str, Mapping[str, Array]] | None = None,
    ood_groups: Mapping[str, Array] | None = None,
    ood_doubts: Mapping[str, Array] | None = None,
    groups: Array | None = None,
    named: Named | None = None,
    places: Places | None = None,
    log_density: Array | None = None,
    about: Mapping[str, str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """The hedged predictive distribution beside the frozen mean with one error bar for all rows.

    ``fields`` holds the hedged prediction by the names of ``posthoc.contract.Regression`` (mean
    and std N×K at least; quantiles N×K×Q with ``quantile_levels``); ``constant_std`` (K) is the
    standard deviation of the frozen model's residuals on calibration rows, around ``frozen_mean``
    (N×K, default: the mean served); ``y`` N×K (or N);
    ``intervals`` lower and upper N×K by alpha, the default level first. The rest as for
    classification, ``ood_doubts`` being error bars. PIT and PCE are of the Gaussian (mean, std),
    over rows and outputs; ``log_density`` N×K is that of the recalibrated distribution, where it
    has one.
    """
    truth = _columns(y)
    check_rows(
        len(truth),
        {
            **fields,
            **{f"lower at alpha {a}": low for a, (low, _) in intervals.items()},
            **{f"upper at alpha {a}": high for a, (_, high) in intervals.items()},
            **{f"score {name}": score for name, score in (ood_in or {}).items()},
        },
    )
    mean = _columns(fields["mean"])
    resampling = Resampling(groups, n_boot, seed)
    said = {HEDGED: (mean, _columns(fields["std"]))}
    if constant_std is not None:
        constant = np.broadcast_to(np.asarray(constant_std, dtype=np.float64), truth.shape)
        own = mean if frozen_mean is None else _columns(frozen_mean)
        said = {CONSTANT: (own, constant), **said}
    losses = {name: _losses(truth - centre, std) for name, (centre, std) in said.items()}
    if log_density is not None:
        losses[HEDGED]["nll_recalibrated"] = -_columns(log_density).mean(axis=1)
    levels, covered, widths = [], {}, {}
    described = np.column_stack([mean, _columns(fields["std"])])
    for alpha, (lower, upper) in intervals.items():
        low, high = _columns(lower), _columns(upper)
        covered[alpha] = np.asarray(((low <= truth) & (truth <= high)).all(axis=1))
        widths[alpha] = (high - low).mean(axis=1)
        levels.append(
            level(
                alpha,
                float(covered[alpha].mean()),
                float(widths[alpha].mean()),
                independent(len(truth), groups),
                n_conformal,
            ).model_copy(
                update={
                    "interval_score": _score(alpha, low, high, truth, resampling),
                    "groups": named_parts(alpha, covered[alpha], named, n_conformal, groups),
                    "worst_slice": None
                    if len(covered) > 1
                    else slice_part(alpha, described, covered[alpha], n_conformal, resampling),
                }
            )
        )
    default = next((a for a, w in widths.items() if np.isfinite(w).all()), None)
    ood, scores = ood_results(ood_in, ood_out, groups, ood_groups)
    return Evaluation(
        task="regression",
        about=dict(about or {}),
        n=len(truth),
        n_conformal=n_conformal,
        systems=tuple(
            _system(n, losses[n], truth - centre, std, resampling)
            for n, (centre, std) in said.items()
        ),
        differences=tuple(differences(losses, ("nll", "crps"), CONSTANT, resampling))
        if CONSTANT in losses
        else (),
        levels=tuple(levels),
        widths=None
        if default is None
        else histogram(f"width at level {level_name(default)}", {IN_ROWS: widths[default]}),
        width_groups=() if default is None else by_width(widths[default], covered[default]),
        quantiles=_quantiles(fields, quantile_levels, truth),
        pce_floor=pce_floor(truth.size),
        answered=answered(fields, covered, None),
        ood=ood,
        scores=scores,
        confidences=histogram(
            "error bar",
            {
                IN_ROWS: said[HEDGED][1].mean(axis=1),
                **{name: _columns(std).mean(axis=1) for name, std in ood_doubts.items()},
            },
        )
        if ood_doubts
        else None,
        spreads=None
        if default is None
        else spread_over(default, widths[default], covered[default], named, (FIFTHS, fifths(mean))),
        worst=furthest_off(fields, mean, said[HEDGED][1], truth, places),
    )


def _losses(error: F64, std: F64) -> dict[str, F64]:
    """Per-row figures, each the mean over the outputs."""
    return {
        "squared_error": (error**2).mean(axis=1),
        "mae": np.abs(error).mean(axis=1),
        "crps": gaussian_crps(error, std).mean(axis=1),
        "nll": gaussian_log_loss(error, std).mean(axis=1),
    }


def _score(alpha: float, low: F64, high: F64, truth: F64, resampling: Resampling) -> Figure | None:
    """Mean interval score with its interval; None where an interval is infinite."""
    score = interval_score(low, high, truth, alpha).mean(axis=1)
    if not np.isfinite(score).all():
        return None
    return figures({"score": score}, resampling)["score"]


def _system(
    name: str, losses: Mapping[str, F64], error: F64, std: F64, resampling: Resampling
) -> System:
    metrics = figures({**losses, "sharpness": std.mean(axis=1)}, resampling)
    squared, sharp = metrics.pop("squared_error"), metrics.pop("sharpness")
    totals = run(pit_totals, [gaussian_pit(np.zeros_like(error), std, error)])
    pce = against(totals.pce, perfect_pce(totals.n, seed=resampling.seed))
    ence = expected_normalised_calibration_error(error**2, std**2)
    rmse = Figure(
        value=math.sqrt(squared.value),
        low=math.sqrt(squared.low or 0.0),
        high=math.sqrt(squared.high or 0.0),
    )
    metrics = {"rmse": rmse, **metrics, "pce": pce}
    if math.isfinite(ence):  # no error bar of 0 is relative to anything
        n_sim = min(N_SIM, resampling.n_boot)
        metrics["ence"] = against(ence, perfect_ence(std**2, n_sim=n_sim, seed=resampling.seed))
    metrics["sharpness"] = sharp
    return System(name=name, metrics=metrics, pit=tuple(totals.count.tolist()))


def _quantiles(
    fields: Mapping[str, Array], levels: Sequence[float], truth: F64
) -> Quantiles | None:
    if not len(levels) or fields.get("quantiles") is None:
        return None
    q = np.reshape(fields["quantiles"], (*truth.shape, -1))
    return Quantiles(
        level=tuple(levels), observed=tuple(observed_quantiles(q, levels, truth).tolist())
    )


def by_width(width: F64, covered: Array) -> tuple[WidthGroup, ...]:
    parts = [p for p in np.array_split(np.argsort(width, kind="stable"), 5) if len(p)]
    return tuple(
        WidthGroup(
            mean_width=float(width[p].mean()), coverage=float(covered[p].mean()), count=len(p)
        )
        for p in parts
    )


def _columns(x: Array) -> F64:
    a = np.asarray(x, dtype=np.float64)
    if a.ndim not in (1, 2):
        raise DataError(f"a regression of rows and outputs was given shape {a.shape}")
    return a[:, None] if a.ndim == 1 else a
