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
    Part,
    Reliability,
    SetSizes,
)
from calibration.metrics.bootstrap import Estimate, mean_estimates, paired_difference
from calibration.metrics.calibration_error import PerfectBand
from calibration.metrics.conditional_coverage import (
    coverage_by_group,
    group_counts,
    size_stratified_violation,
    strata_counts,
    violation_range,
)
from calibration.metrics.coverage import SetTotals, coverage_band
from calibration.metrics.ranking import aupr, auroc_estimate, fpr95
from calibration.metrics.totals import level_name
from calibration.metrics.worst_slice import worst_slice
from posthoc.contract import F64, Array, DataError
from posthoc.folds import run

HEDGED = "hedged"
IN_ROWS = "test rows"
_SCORE_BINS = 40
_GROUPS = 50  # least covered ones that are kept
_SLICEABLE = 200  # independent rows from which on a slice of a tenth of a half says anything


class Named(NamedTuple):
    """Groups of rows that coverage is split by: N names, and by alpha and group the conformal rows
    behind its threshold where each has one of its own (a group missing there: all of them)."""

    names: Array
    rows: Mapping[float, Mapping[str, int]]


class Places(NamedTuple):
    """Where N rows stand in their table, and their ids, where it has some."""

    rows: Array
    ids: Array | None = None


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


def named_parts(
    alpha: float,
    covered: Array,
    named: Named | None,
    n_conformal: int,
    groups: Array | None,
) -> tuple[Part, ...]:
    """Coverage at ``alpha`` of the least covered named groups, from N covered rows."""
    if named is None:
        return ()
    names = np.asarray(named.names).astype(str)
    check_rows(len(covered), {"named groups": names})
    counts = run(group_counts, [{"covered": covered, "group": names}])
    own = named.rows.get(alpha, {})
    found = coverage_by_group(
        counts,
        {name: own.get(name, n_conformal) for name in counts},
        alpha,
        independent={
            name: independent(n, None if groups is None else np.asarray(groups)[names == name])
            for name, (n, _) in counts.items()
        },
    )
    return tuple(
        Part(name=p.name, n=p.n, coverage=p.coverage, band_low=p.low, band_high=p.high)
        for p in found[:_GROUPS]
    )


def slice_part(
    alpha: float, features: F64, covered: Array, n_conformal: int, resampling: Resampling
) -> Part | None:
    """The worst slice of ``features`` (N×D) at ``alpha``; None where there are too few rows."""
    if independent(len(covered), resampling.groups) < _SLICEABLE:
        return None
    found = worst_slice(features, covered, groups=resampling.groups, seed=resampling.seed)
    if not len(found.rows):
        return None
    of = None if resampling.groups is None else np.asarray(resampling.groups)[found.rows]
    low, high = coverage_band(n_conformal, independent(len(found.rows), of), alpha)
    return Part(
        name="worst slice",
        n=len(found.rows),
        coverage=found.coverage,
        band_low=low,
        band_high=high,
    )


def size_violation(
    alpha: float, totals: SetTotals, n_conformal: int, resampling: Resampling
) -> Figure:
    """The violation by set size, beside its range where rows are independent evidence."""
    value = size_stratified_violation(totals, alpha)
    if resampling.groups is not None:
        return Figure(value=value)
    sizes = [n for n, _ in strata_counts(totals)]
    return against(value, violation_range(sizes, n_conformal, alpha, seed=resampling.seed))


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


def histogram(
    name: str, sets: Mapping[str, Array], span: tuple[float, float] | None = None
) -> Histogram:
    """Shares over common bins that span the middle 99 % of each set, or ``span``; the ends hold
    the rest."""
    values = {n: np.asarray(v, dtype=np.float64) for n, v in sets.items()}
    ends = np.array([np.quantile(v, [0.005, 0.995]) for v in values.values()])
    low, high = (float(ends[:, 0].min()), float(ends[:, 1].max())) if span is None else span
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
