"""What both tasks' evaluations share: differences, levels, strange rows, histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from calibration.evaluation.records import (
    Answered,
    Difference,
    Figure,
    Histogram,
    Level,
    OodResult,
    Reliability,
    SetSizes,
)
from calibration.metrics.bootstrap import Estimate, mean_estimates, paired_difference
from calibration.metrics.calibration_error import PerfectBand
from calibration.metrics.coverage import SetTotals, coverage_band
from calibration.metrics.ranking import aupr, auroc_estimate, fpr95
from calibration.metrics.totals import level_name
from posthoc.contract import F64, Array, DataError

HEDGED = "hedged"
IN_ROWS = "test rows"
_SCORE_BINS = 40


class Resampling(NamedTuple):
    """How intervals are drawn: groups of rows that are no independent evidence, draws, seed."""

    groups: Array | None
    n_boot: int
    seed: int


def check_rows(n: int, arrays: Mapping[str, Array]) -> None:
    """DataError naming the first array that has not n rows."""
    for name, a in arrays.items():
        if len(a) != n:
            raise DataError(f"{name} has {len(a)} rows where there are {n} labels")


def figures(columns: Mapping[str, Array], resampling: Resampling) -> dict[str, Figure]:
    """Mean of each column of per-row figures, with its bootstrap interval."""
    estimates = mean_estimates(
        columns, groups=resampling.groups, n_boot=resampling.n_boot, seed=resampling.seed
    )
    return {name: figure(e) for name, e in estimates.items()}


def figure(e: Estimate) -> Figure:
    """An estimate as a figure of the report."""
    return Figure(value=e.value, low=e.low, high=e.high)


def against(value: float, band: tuple[float, float]) -> Figure:
    """A calibration error beside what a perfectly calibrated model would show."""
    return Figure(value=value, low=band[0], high=band[1], range="perfect")


def reliability(count: Array, right: Array, claimed: Array, band: PerfectBand) -> Reliability:
    """The filled ones of the 20 confidence bins, from counts and sums over their rows."""
    filled = np.flatnonzero(count)
    n = count[filled]
    return Reliability(
        count=tuple(int(k) for k in n),
        confidence=tuple((claimed[filled] / n).tolist()),
        accuracy=tuple((right[filled] / n).tolist()),
        low=tuple(band.accuracy_low[filled].tolist()),
        high=tuple(band.accuracy_high[filled].tolist()),
    )


def shares_of_sizes(alpha: float, totals: SetTotals) -> SetSizes:
    """The set sizes that occur at ``alpha``."""
    coverage = totals.coverage_by_size
    return SetSizes(
        level=level_name(alpha),
        size=tuple(coverage),
        count=tuple(int(totals.count[s]) for s in coverage),
        coverage=tuple(coverage.values()),
    )


def difference(metric: str, other: str, e: Estimate) -> Difference:
    """Hedged less ``other``."""
    return Difference(metric=metric, of=HEDGED, to=other, **asdict(e))


def differences(
    losses: Mapping[str, Mapping[str, F64]],
    metrics: Sequence[str],
    other: str,
    resampling: Resampling,
) -> list[Difference]:
    """Hedged less ``other`` in each of the per-row ``metrics``, paired by row."""
    mine, theirs = losses[HEDGED], losses[other]
    groups, n_boot, seed = resampling
    return [
        difference(
            m,
            other,
            paired_difference(mine[m], theirs[m], groups=groups, n_boot=n_boot, seed=seed),
        )
        for m in metrics
    ]


def independent(n: int, groups: Array | None) -> int:
    """Rows that count in a band: all of them, or one a group (the wider, safe side)."""
    return n if groups is None else len(np.unique(np.asarray(groups)))


def level(
    alpha: float,
    coverage: float,
    mean_size: float,
    n: int,
    n_conformal: int,
    empty_share: float | None = None,
) -> Level:
    """Coverage at ``alpha`` beside the band of n independent test rows."""
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


def answered(
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
        error=None if right is None else float(1 - np.asarray(right)[kept].mean()),
        level=None if alpha is None else level_name(alpha),
        coverage=None if alpha is None else float(covered[alpha][kept].mean()),
    )


def ood_results(
    ood_in: Mapping[str, Array] | None,
    ood_out: Mapping[str, Mapping[str, Array]] | None,
    groups: Array | None,
    out_groups: Mapping[str, Array] | None,
) -> tuple[tuple[OodResult, ...], tuple[Histogram, ...]]:
    """Each score on each strange set that has it, and the histograms of each score."""
    ood_in, ood_out, out_groups = ood_in or {}, ood_out or {}, out_groups or {}
    results = [
        OodResult(
            score=score,
            out=out,
            n_out=len(values[score]),
            auroc=figure(
                auroc_estimate(
                    inside,
                    values[score],
                    negative_groups=groups,
                    positive_groups=out_groups.get(out),
                )
            ),
            aupr=aupr(inside, values[score]),
            fpr95=fpr95(inside, values[score]),
        )
        for score, inside in ood_in.items()
        for out, values in ood_out.items()
        if score in values
    ]
    histograms = [
        histogram(
            score,
            {
                IN_ROWS: inside,
                **{out: values[score] for out, values in ood_out.items() if score in values},
            },
        )
        for score, inside in ood_in.items()
    ]
    return tuple(results), tuple(histograms)


def histogram(name: str, sets: Mapping[str, Array]) -> Histogram:
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
