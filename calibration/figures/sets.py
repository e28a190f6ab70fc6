"""What corruption does, and how sets, intervals and confidences are spread."""

from __future__ import annotations

from typing import Any

from calibration.evaluation.parts import IN_ROWS
from calibration.evaluation.records import Evaluation, Figure, SetSummary, Spreads
from calibration.figures.panel import (
    OUT_COLOURS,
    SHARE,
    Panel,
    axes,
    level_percent,
    outline,
    percent,
    unit,
)

_SYMBOLS = ("circle", "square", "diamond", "cross", "x")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def under_corruption(evaluation: Evaluation) -> Panel:
    """Accuracy, calibration, flags and the error of what is answered, over severity."""
    clean = evaluation.sets[0]
    spoilt: dict[str, list[SetSummary]] = {}
    for s in evaluation.sets:
        if s.corruption is not None:
            spoilt.setdefault(s.corruption, [clean]).append(s)
    shown = [r for r in _rows(evaluation.task) if any(_of(s, r[0]) for s in evaluation.sets)]
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {}
    step = 1 / len(shown)
    for i, (key, title, form) in enumerate(shown):
        y = "y" if i == 0 else f"y{i + 1}"
        high = 1 - i * step
        layout[f"yaxis{i + 1 if i else ''}"] = {
            "title": {"text": title},
            "domain": [max(0.0, high - step + 0.045), high],
            **({"tickformat": ".0%"} if form == "%" else {}),
            **({"rangemode": "tozero"} if key != "accuracy" else {}),
        }
        for j, (name, sets) in enumerate(spoilt.items()):
            found = [(s.severity or 0, _of(s, key)) for s in sets]
            known = [(x, f) for x, f in found if f is not None]
            data.append(
                {
                    "type": "scatter",
                    "name": name,
                    "legendgroup": name,
                    "showlegend": i == 0,
                    "mode": "lines+markers",
                    "x": [x for x, _ in known],
                    "y": [f.value for _, f in known],
                    "yaxis": y,
                    "line": {
                        "color": f"var(--out-{j % OUT_COLOURS})",
                        "width": 2,
                        "dash": _DASHES[j % len(_DASHES)],
                    },
                    "marker": {"symbol": _SYMBOLS[j % len(_SYMBOLS)], "size": 8},
                    "error_y": _bars([f for _, f in known]),
                    "hovertemplate": f"{name}, severity %{{x}}<br>{title.replace('<br>', ' ')} "
                    + ("%{y:.2%}" if form == "%" else "%{y:.4g}")
                    + "<extra></extra>",
                }
            )
    last = "y" if len(shown) == 1 else f"y{len(shown)}"
    layout["xaxis"] = {
        "title": {"text": "severity (0: as given)"},
        "dtick": 1,
        "range": [-0.2, 5.2],
        "anchor": last,
    }
    return Panel(
        "under-corruption",
        "Under corruption",
        "The same rows, spoilt more and more: a model that knows its limits stays calibrated as it "
        "gets worse, flags more, and errs little on what it still answers; read them together. "
        "Bars are 95 % intervals; the promised coverage is for rows like those of the fit, not for "
        "these.",
        data,
        layout,
        tall=True,
    )


def _rows(task: str) -> list[tuple[str, str, str]]:
    first: tuple[tuple[str, str, str], ...] = (
        (("accuracy", "accuracy", "%"), ("debiased_ece", "ECE, debiased", "%"))
        if task == "classification"
        else (("rmse", "RMSE", ""), ("pce", "PCE", "%"))
    )
    error = ("answered_error", "error of<br>the answered", "%")
    if task == "regression":
        error = ("answered_error", "RMSE of<br>the answered", "")
    return [*first, ("flagged", "share flagged", "%"), error]


def _of(s: SetSummary, key: str) -> Figure | None:
    if key == "flagged":
        return s.flagged
    return s.answered_error if key == "answered_error" else s.metrics.get(key)


def _bars(found: list[Figure]) -> dict[str, Any]:
    """Intervals as error bars; none for where a perfect model would lie."""
    if any(f.range != "interval" or f.low is None or f.high is None for f in found):
        return {"visible": False}
    return {
        "type": "data",
        "symmetric": False,
        "array": [(f.high or 0.0) - f.value for f in found],
        "arrayminus": [f.value - (f.low or 0.0) for f in found],
        "thickness": 1,
        "width": 0,
    }


def confidences(evaluation: Evaluation) -> Panel:
    """Confidence, or the error bar, of the test rows and of the strange ones."""
    assert evaluation.confidences is not None
    histogram = evaluation.confidences
    names = list(histogram.shares)
    data = [
        outline(
            histogram,
            name,
            "var(--hedged)" if name == IN_ROWS else f"var(--out-{(i - 1) % OUT_COLOURS})",
            "solid" if name == IN_ROWS else "dot",
        )
        for i, name in enumerate(names)
    ]
    rows = unit(evaluation)
    if evaluation.task == "classification":
        sure = sum(histogram.shares[IN_ROWS][-4:])
        said = f"{percent(sure)} of the test {rows} are given 90 % or more"
        for name in names[1:4]:
            said += f", {percent(sum(histogram.shares[name][-4:]))} of {name}"
        title, x = "Confidence", "confidence of the answer"
        meaning = (
            "How sure hedged says it is: a confidence is honest where as many answers are right "
            f"(see Reliability), and strange rows should be given less of it; {said}."
        )
    else:
        title, x = "Error bars", "error bar in the target's units"
        meaning = (
            "Strange rows should be given wider error bars than the test rows; the outermost bins "
            "hold everything beyond them."
        )
    own = {"tickformat": ".0%"} if evaluation.task == "classification" else {}
    return Panel(
        "confidence", title, meaning, data, axes(x, f"share of {rows}", xaxis=own, yaxis=SHARE)
    )


def spreads(evaluation: Evaluation) -> Panel:
    """Set sizes or widths within groups, with the coverage of each."""
    assert evaluation.spreads is not None
    s: Spreads = evaluation.spreads
    names = [p.name if len(p.name) <= 24 else f"{p.name[:23]}…" for p in s.parts]
    # Two parts may be cut to one name, and a category is told by its name alone.
    names = [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]
    sets = evaluation.task == "classification"
    level = next(v for v in evaluation.levels if v.level == s.level)
    what = "Set sizes" if sets else "Interval widths"
    quantiles = list(zip(*(p.quantiles for p in s.parts), strict=True))
    goal = 1 - level.alpha
    return Panel(
        "spreads",
        f"{what} by {s.by}",
        f"Boxes hold the middle half of the {'sizes' if sets else 'widths'} at level "
        f"{level_percent(level.alpha)}, whiskers 5 % to 95 %, the line the median. Below: how "
        "often they hold the truth in each part. Only the average over all rows is promised"
        + (", unless groups have thresholds of their own." if s.by == "group" else "."),
        [
            {
                "type": "box",
                "name": "size" if sets else "width",
                "x": names,
                "lowerfence": quantiles[0],
                "q1": quantiles[1],
                "median": quantiles[2],
                "q3": quantiles[3],
                "upperfence": quantiles[4],
                "mean": [p.mean for p in s.parts],
                "line": {"color": "var(--hedged)"},
                "fillcolor": "var(--band)",
            },
            {
                "type": "scatter",
                "name": "coverage",
                "mode": "markers",
                "x": names,
                "y": [p.coverage for p in s.parts],
                "yaxis": "y2",
                "customdata": [p.n for p in s.parts],
                "marker": {"color": "var(--hedged)", "symbol": "diamond", "size": 8},
                "hovertemplate": "%{x}: %{y:.1%} covered<br>%{customdata} rows<extra></extra>",
            },
            {
                "type": "scatter",
                "name": "level",
                "mode": "lines",
                "x": names,
                "y": [goal] * len(names),
                "yaxis": "y2",
                "line": {"color": "var(--muted)", "width": 1},
                "hoverinfo": "skip",
            },
        ],
        axes(
            s.by,
            "classes in the set" if sets else "width",
            xaxis={"type": "category", "anchor": "y2"},
            yaxis={"domain": [0.46, 1], "rangemode": "tozero"},
            yaxis2={
                "title": {"text": "covered"},
                "domain": [0, 0.36],
                "range": [min(0.5, *(p.coverage for p in s.parts)) - 0.05, 1.05],
                "tickformat": ".0%",
            },
            showlegend=False,
        ),
    )
