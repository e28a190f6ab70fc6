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
)
from calibration.metrics.regression import PIT_BINS


def pit(evaluation: Evaluation) -> Panel:
    centres = [(b + 0.5) / PIT_BINS for b in range(PIT_BINS)]
    data: list[dict[str, Any]] = []
    for i, s in enumerate(evaluation.systems):
        if s.pit is None:
            continue
        n = sum(s.pit)
        if not data:
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
    pce = next(s for s in evaluation.systems if s.name == HEDGED).metrics["pce"].value
    return Panel(
        "pit",
        "Probability integral transform",
        "Where in its predicted distribution each target fell: flat is calibrated, a hump in the "
        "middle means error bars that are too wide, raised ends too narrow. Hedged is "
        f"{percent(pce, 2)} off flat on average; a perfect Gaussian on as many rows would be "
        f"{percent(evaluation.pce_floor or 0, 2)}.",
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


def widths(histogram: Histogram) -> Panel:
    return Panel(
        "widths",
        f"Interval {histogram.name}",
        "The narrower an interval, the more it says; a spread of widths means that the model knows "
        "where it is unsure. The outermost bins hold everything beyond them.",
        [outline(histogram, name, "var(--hedged)", "solid") for name in histogram.shares],
        axes("width in the target's units", "share of rows", yaxis=SHARE) | {"showlegend": False},
    )


def width_groups(evaluation: Evaluation) -> Panel:
    groups = evaluation.width_groups
    goal = 1 - evaluation.levels[0].alpha
    names = [f"{g.mean_width:.3g}" for g in groups]
    return Panel(
        "width-coverage",
        "Coverage by interval width",
        "The rows in fifths by the width of their interval: if the narrow ones cover less than "
        "the wide ones, the model is surer than it should be where it claims to be sure. Only "
        "the average is promised.",
        [
            {
                "type": "bar",
                "name": "coverage",
                "x": names,
                "y": [g.coverage for g in groups],
                "customdata": [g.count for g in groups],
                "marker": {"color": "var(--hedged)"},
                "hovertemplate": "mean width %{x}: %{y:.1%}<br>%{customdata} rows<extra></extra>",
            },
            {
                **guide([], [], "level"),
                "x": names,
                "y": [goal] * len(names),
            },
        ],
        axes(
            "mean width of the fifth",
            "share of rows covered",
            xaxis={"type": "category"},
            yaxis={"range": [0, 1.02], "tickformat": ".0%"},
            showlegend=False,
        ),
    )
