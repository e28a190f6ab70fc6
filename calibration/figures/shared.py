"""Coverage against level, and the histograms of the scores."""

from __future__ import annotations

from calibration.evaluation.images import PIXELS
from calibration.evaluation.parts import HEDGED, IN_ROWS
from calibration.evaluation.records import Evaluation, Histogram
from calibration.figures.panel import (
    OUT_COLOURS,
    SHARE,
    Panel,
    axes,
    guide,
    outline,
    unit,
)


def coverage(evaluation: Evaluation) -> Panel:
    levels = sorted(evaluation.levels, key=lambda v: v.alpha, reverse=True)
    x = [1 - v.alpha for v in levels]
    banded = [v for v in levels if v.banded]
    edges = [*x, *[v.coverage for v in levels], *[v.band_low for v in banded]]
    low = max(0.0, min(edges) - 0.03)
    dense = evaluation.dense is not None
    what = "A set" if evaluation.task == "classification" else "An interval"
    whose = "a new image's pixels, averaged over images" if dense else "new rows"
    mask = levels[0].images.mask if levels[0].images is not None else None
    if mask is not None:
        what, whose = f"A mask of {mask}", "a new image's pixels of it, averaged over images"
    inside = sum(v.band_low <= v.coverage <= v.band_high for v in banded)
    luck = (
        f"the bars show the luck that {evaluation.n_conformal:,} conformal and {evaluation.n:,} "
        f"test {'images' if dense else 'rows'} leave open. {inside} of {len(levels)} levels lie "
        "inside."
        if banded
        else "thresholds differ among rows, or are weighted for production rows, so that no one "
        "band of luck holds for all rows together."
    )
    data = [
        guide([low, 1], [low, 1], "coverage = level"),
        {
            "type": "scatter",
            "name": "chance, 99 %",
            "mode": "lines",
            # A gap after each bar: nulls break the line.
            "x": [p for v in banded for p in (1 - v.alpha, 1 - v.alpha, None)],
            "y": [p for v in banded for p in (v.band_low, v.band_high, None)],
            "line": {"color": "var(--bar)", "width": 12},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "name": HEDGED,
            "mode": "markers",
            "x": x,
            "y": [v.coverage for v in levels],
            "marker": {"color": "var(--hedged)", "symbol": "diamond", "size": 9},
            "customdata": [[v.band_low, v.band_high] for v in levels],
            "hovertemplate": "level %{x:.1%}<br>covered %{y:.2%}"
            + "<br>band %{customdata[0]:.2%} to %{customdata[1]:.2%}" * bool(banded),
        },
    ]
    return Panel(
        "coverage",
        "Coverage against level",
        f"{what} asked for at level 90 % should hold the truth for 90 % of {whose}; {luck}",
        data,
        axes(
            "level asked for",
            f"share of {unit(evaluation)} covered",
            xaxis={"range": [low, 1.01], "tickformat": ".0%"},
            yaxis={"range": [low, 1.01], "tickformat": ".0%"},
        ),
    )


def scores(i: int, histogram: Histogram, evaluation: Evaluation) -> Panel:
    sets = list(histogram.shares)
    data = [
        outline(
            histogram,
            name,
            "var(--hedged)"
            if name == IN_ROWS
            else f"var(--out-{(sets.index(name) - 1) % OUT_COLOURS})",
            "solid" if name == IN_ROWS else "dot",
        )
        for name in sets
    ]
    found = [r for r in evaluation.ood if r.score == histogram.name]
    rows = "rows"
    if evaluation.dense is not None:
        rows = "pixels" if histogram.name.endswith(PIXELS.format("")) else "images"
    told = "; ".join(f"{r.out} {r.auroc.value:.3f}" for r in found)
    return Panel(
        f"scores-{i}",
        f"Score “{histogram.name}”",
        f"The further the strange {rows} lie to the right of the test {rows}, the better the score "
        "tells them apart"
        + (f" (AUROC, 0.5 is a coin toss: {told})" if told else "")
        + "; the outermost bins hold everything beyond them.",
        data,
        axes("score (larger = stranger)", f"share of {rows}", yaxis=SHARE),
    )
