"""PIT, quantiles, interval widths and what they cover."""

from __future__ import annotations

import math
from typing import Any

from calibration.evaluation.parts import HEDGED
from calibration.evaluation.records import Evaluation, Histogram
from calibration.figures.panel import (
    SHARE,
    Panel,
    axes,
    band,
    colour,
    guide,
    outline,
    percent,
    unit,
)
from calibration.metrics.regression import PIT_BINS


def drawn(evaluation: Evaluation) -> str:
    """Where a figure is of drawn pixels, the sentence that says so."""
    if evaluation.dense is None:
        return ""
    return f" Of each image {evaluation.dense.sampled} pixels at most were drawn for it."


def pit(evaluation: Evaluation) -> Panel:
    centres = [(b + 0.5) / PIT_BINS for b in range(PIT_BINS)]
    data: list[dict[str, Any]] = []
    for i, s in enumerate(evaluation.systems):
        if s.pit is None:
            continue
        n = sum(s.pit)
        if not data and evaluation.dense is None:
            p = 1 / PIT_BINS
            half = 2.576 * math.sqrt(p * (1 - p) / n)
            data.append(band([0, 1], [p - half] * 2, [p + half] * 2, "perfect model, 99 %"))
        data.append(
            {
                "type": "bar",
                "name": s.name,
                "x": centres,
                "y": [c / n for c in s.pit],
                "marker": {"color": colour(s, i)},
                "hovertemplate": "PIT near %{x:.3f}: %{y:.1%}",
            }
        )
    floor = evaluation.pce_floor
    perfect = (
        "; how far a perfect Gaussian would be depends on how the pixels of an image hang together"
        if floor is None
        else f"; a perfect Gaussian on as many rows would be {percent(floor, 2)}"
    )
    pce = next(s for s in evaluation.systems if s.name == HEDGED).metrics["pce"].value
    return Panel(
        "pit",
        "Probability integral transform",
        "Where in its predicted distribution each target fell: flat is calibrated, a hump in the "
        "middle means error bars that are too wide, raised ends too narrow. Hedged is "
        f"{percent(pce, 2)} off flat on average{perfect}.",
        data,
        axes(
            "PIT of the target",
            "share of targets",
            xaxis={"range": [0, 1]},
            yaxis=SHARE,
            barmode="group",
            bargap=0.15,
        ),
    )


def quantiles(evaluation: Evaluation) -> Panel:
    assert evaluation.quantiles is not None
    q = evaluation.quantiles
    return Panel(
        "quantiles",
        "Predicted quantiles",
        "A tenth of the targets should fall below the predicted 10 % quantile, half below the "
        "median, and so on: honest quantiles lie on the diagonal.",
        [
            guide([0, 1], [0, 1], "honest"),
            {
                "type": "scatter",
                "name": HEDGED,
                "mode": "lines+markers",
                "x": q.level,
                "y": q.observed,
                "line": {"color": "var(--hedged)", "width": 2},
                "marker": {"color": "var(--hedged)", "symbol": "diamond", "size": 8},
                "hovertemplate": "quantile %{x:.1%}<br>below it %{y:.1%}",
            },
        ],
        axes(
            "quantile asked for",
            "share of targets below",
            xaxis={"range": [0, 1], "tickformat": ".0%"},
            yaxis={"range": [0, 1], "tickformat": ".0%"},
        ),
    )


def widths(histogram: Histogram, evaluation: Evaluation) -> Panel:
    return Panel(
        "widths",
        f"Interval {histogram.name}",
        "The narrower an interval, the more it says; a spread of widths means that the model knows "
        f"where it is unsure. The outermost bins hold everything beyond them.{drawn(evaluation)}",
        [outline(histogram, name, "var(--hedged)", "solid") for name in histogram.shares],
        axes("width in the target's units", f"share of {unit(evaluation)}", yaxis=SHARE)
        | {"showlegend": False},
    )


def width_groups(evaluation: Evaluation) -> Panel:
    groups = evaluation.width_groups
    goal = 1 - evaluation.levels[0].alpha
    rows = unit(evaluation)
    names = [f"{g.mean_width:.3g}" for g in groups]
    return Panel(
        "width-coverage",
        "Coverage by interval width",
        f"The {rows} in fifths by the width of their interval: if the narrow ones cover less than "
        "the wide ones, the model is surer than it should be where it claims to be sure. Only "
        f"the average is promised.{drawn(evaluation)}",
        [
            {
                "type": "bar",
                "name": "coverage",
                "x": names,
                "y": [g.coverage for g in groups],
                "customdata": [g.count for g in groups],
                "marker": {"color": "var(--hedged)"},
                "hovertemplate": f"mean width %{{x}}: %{{y:.1%}}<br>%{{customdata}} {rows}"
                "<extra></extra>",
            },
            {
                **guide([], [], "level"),
                "x": names,
                "y": [goal] * len(names),
            },
        ],
        axes(
            "mean width of the fifth",
            f"share of {rows} covered",
            xaxis={"type": "category"},
            yaxis={"range": [0, 1.02], "tickformat": ".0%"},
            showlegend=False,
        ),
    )
