"""What only maps have: uncovered pixels by image, sparsification, variance against error."""

from __future__ import annotations

import math
from collections.abc import Sequence

from calibration.evaluation.parts import HEDGED, IN_ROWS
from calibration.evaluation.records import Evaluation, Level, Sparsified, VarianceBins
from calibration.figures.panel import (
    SHARE,
    Panel,
    axes,
    guide,
    level_percent,
    outline,
    percent,
)


def uncovered(level: Level) -> Panel:
    assert level.images is not None
    shares = level.images
    what, of = "uncovered", "an image's pixels"
    title = f"Uncovered pixels by image at level {level_percent(level.alpha)}"
    if shares.mask is not None:
        what, of = "missed", f"an image's pixels of {shares.mask}"
        title = (
            f"Pixels of {shares.mask} that its mask misses at level {level_percent(level.alpha)}"
        )
    tall = max(shares.histogram.shares[IN_ROWS])
    middle, most, nearly = (percent(q) for q in shares.quantiles)
    return Panel(
        "uncovered",
        title,
        f"The promise is of the mean over images, here {percent(shares.mean.value, 2)} where at "
        f"most {percent(level.alpha)} is promised (the line); a single image may have more: "
        f"{percent(shares.above.value)} of them do. Half of the images have at most {middle} "
        f"{what}, 90 % at most {most} and 99 % at most {nearly}.",
        [
            outline(shares.histogram, IN_ROWS, "var(--hedged)", "solid"),
            guide([level.alpha, level.alpha], [0, tall], "alpha"),
        ],
        axes(
            f"share of {of} that is {what}",
            "share of images",
            xaxis={"tickformat": ".0%", "rangemode": "tozero"},
            yaxis=SHARE,
            showlegend=False,
        ),
    )


def sparsification(curve: Sparsified, evaluation: Evaluation) -> Panel:
    metrics = next(s for s in evaluation.systems if s.name == HEDGED).metrics
    area, random = metrics["ause"].value, metrics["ause_random"].value
    what = "wrong pixels" if evaluation.task == "classification" else "absolute error"
    x = list(curve.x)
    return Panel(
        "sparsification",
        "Sparsification",
        f"The share of {what} that is left once the least certain pixels of an image are set "
        "aside, mean over images: a map that knows where it errs falls as fast as the oracle, "
        "which sets aside by the error itself; a random order stays at 1. The area to the "
        f"oracle (AUSE) is {area:.3f}, of a random order {random:.3f}.",
        [
            guide([0, 1], [1, 1], "random order"),
            {
                "type": "scatter",
                "name": "oracle",
                "mode": "lines",
                "x": x,
                "y": curve.oracle,
                "line": {"color": "var(--system-0)", "dash": "dot", "width": 2},
                "hovertemplate": "without %{x:.0%}<br>left %{y:.2f}",
            },
            {
                "type": "scatter",
                "name": curve.name,
                "mode": "lines",
                "x": x,
                "y": curve.y,
                "line": {"color": "var(--hedged)", "width": 2},
                "hovertemplate": "without %{x:.0%}<br>left %{y:.2f}",
            },
        ],
        axes(
            "share of pixels set aside",
            "error left, over that of all pixels",
            xaxis={"range": [0, 1], "tickformat": ".0%"},
            yaxis={"rangemode": "tozero"},
        ),
    )


def calibration_curve(bins: Sequence[VarianceBins]) -> Panel:
    own = next(b for b in bins if b.name == HEDGED)
    ends = [math.sqrt(v) for v in (*own.variance, *own.squared_error)]
    span = [0.0, max(ends)]
    data = [guide(span, span, "honest")]
    for i, b in enumerate(bins):
        mine = b.name == HEDGED
        name = "var(--hedged)" if mine else f"var(--system-{i})"
        data.append(
            {
                "type": "scatter",
                "name": b.name,
                "mode": "lines+markers",
                "x": [math.sqrt(v) for v in b.variance],
                "y": [math.sqrt(e) for e in b.squared_error],
                "customdata": b.count,
                "line": {"color": name, "width": 2},
                "marker": {"color": name, "symbol": "diamond" if mine else "circle", "size": 8},
                "hovertemplate": "said %{x:.4g}<br>was %{y:.4g}<br>%{customdata} pixels",
            }
        )
    return Panel(
        "variance",
        "Error against error bar",
        "Pixels in twentieths by their standard deviation: the root mean squared error of each "
        "should equal what was said. Points above the line are over-confident, and a curve that "
        "spans little of the axis tells few pixels apart.",
        data,
        axes(
            "standard deviation said",
            "root mean squared error",
            xaxis={"rangemode": "tozero"},
            yaxis={"rangemode": "tozero"},
        ),
    )
