"""Reliability, risk against coverage, set sizes."""

from __future__ import annotations

import math

from calibration.evaluation.parts import HEDGED
from calibration.evaluation.records import Evaluation, Level, SetSizes
from calibration.figures.panel import (
    SHARE,
    Panel,
    axes,
    band,
    guide,
    level_percent,
    line,
    percent,
    unit,
)


def reliability(evaluation: Evaluation) -> Panel:
    rows = unit(evaluation)
    data = [guide([0, 1], [0, 1], "perfect calibration")]
    for i, s in enumerate(evaluation.systems):
        r = s.reliability
        if r is None:
            continue
        if s.name == HEDGED:
            x = list(r.confidence)
            data.insert(0, band(x, list(r.low), list(r.high), "perfect model, 95 %"))
        trace = line(
            s,
            i,
            mode="lines+markers",
            x=r.confidence,
            y=r.accuracy,
            customdata=r.count,
            hovertemplate=f"confidence %{{x:.1%}}<br>right %{{y:.1%}}<br>%{{customdata}} {rows}",
        )
        # Area, not width, grows with the rows: the eye compares areas.
        trace["marker"]["size"] = [4 + 14 * math.sqrt(k / sum(r.count)) for k in r.count]
        data.append(trace)
    as_many = "rows" if evaluation.dense is None else "images, whose pixels hang together"
    ece = next(s for s in evaluation.systems if s.name == HEDGED).metrics["debiased_ece"]
    return Panel(
        "reliability",
        "Reliability",
        f"Of the {rows} that were given a confidence of 80 %, 80 % should be right: points below "
        "the diagonal are over-confident, and points inside the shaded band are what a perfectly "
        f"calibrated model would also show. Hedged has a debiased ECE of {percent(ece.value, 2)}; "
        f"the perfect model would have {percent(ece.low or 0, 2)} to {percent(ece.high or 0, 2)} "
        f"on as many {as_many}. Larger marks stand for more {rows}.",
        data,
        axes(
            "confidence",
            "share that was right",
            xaxis={"range": [0, 1.02], "tickformat": ".0%"},
            yaxis={"range": [0, 1.04], "tickformat": ".0%"},
        ),
    )


def risk_coverage(evaluation: Evaluation) -> Panel:
    data = [
        line(
            s,
            i,
            mode="lines",
            x=s.risk_coverage.x,
            y=s.risk_coverage.y,
            hovertemplate="answering %{x:.0%}<br>wrong %{y:.2%}",
        )
        for i, s in enumerate(evaluation.systems)
        if s.risk_coverage is not None
    ]
    curve = next(s for s in evaluation.systems if s.name == HEDGED).risk_coverage
    half = curve.y[min(range(len(curve.x)), key=lambda i: abs(curve.x[i] - 0.5))] if curve else 0.0
    return Panel(
        "risk-coverage",
        "Risk against coverage",
        "Answering only the most confident share of the rows (left to right: from the surest row "
        "to all of them), this share of the answers is wrong; lower is better. Hedged errs on "
        f"{percent(half, 2)} of the surer half and on {percent(curve.y[-1] if curve else 0.0, 2)} "
        "of all rows.",
        data,
        axes(
            "share of rows answered",
            "share of answers wrong",
            xaxis={"range": [0, 1.02], "tickformat": ".0%"},
            yaxis=SHARE,
        ),
    )


def set_sizes(sizes: SetSizes, level: Level, rows: str) -> Panel:
    total = sum(sizes.count)
    goal = 1 - level.alpha
    span = [min(sizes.size) - 0.5, max(sizes.size) + 0.5]
    mean = "" if level.mean_size is None else f"{level.mean_size:.2f} classes on average, "
    return Panel(
        "set-sizes",
        f"Set sizes at level {level_percent(level.alpha)}",
        f"The fewer classes in a set, the more it says: {mean}and "
        f"{percent(level.empty_share or 0)} of the sets are empty (no class is plausible enough). "
        "Below: how often the sets of each size hold the truth. Only the average over all "
        "sizes is promised.",
        [
            {
                "type": "bar",
                "name": f"share of {rows}",
                "x": sizes.size,
                "y": [c / total for c in sizes.count],
                "marker": {"color": "var(--hedged)"},
                "hovertemplate": f"%{{x}} classes: %{{y:.1%}} of {rows}<extra></extra>",
            },
            {
                "type": "scatter",
                "name": "coverage within size",
                "mode": "markers",
                "x": sizes.size,
                "y": sizes.coverage,
                "yaxis": "y2",
                "customdata": sizes.count,
                "marker": {"color": "var(--hedged)", "symbol": "diamond", "size": 8},
                "hovertemplate": f"%{{x}} classes: %{{y:.1%}} covered<br>%{{customdata}} {rows}"
                "<extra></extra>",
            },
            {**guide(span, [goal, goal], "level"), "yaxis": "y2"},
        ],
        axes(
            "classes in the set",
            f"share of {rows}",
            # Sizes are whole numbers: ticks at quarters would say otherwise.
            xaxis={
                "range": span,
                "anchor": "y2",
                "dtick": max(1, math.ceil((span[1] - span[0]) / 12)),
                "tick0": 0,
            },
            yaxis={**SHARE, "domain": [0.46, 1]},
            yaxis2={
                "title": {"text": "covered"},
                "domain": [0, 0.36],
                "range": [-0.05, 1.08],
                "tickformat": ".0%",
            },
            showlegend=False,
        ),
    )
