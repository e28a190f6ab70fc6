"""What a figure is, and the strokes that all of them are drawn with.

Colours are named ``var(--hedged)`` and resolved by the page, so that they follow its light or
dark scheme. Nothing here imports plotly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calibration.evaluation.parts import HEDGED
from calibration.evaluation.records import Evaluation, Histogram, System

SHARE = {"tickformat": ".0%", "rangemode": "tozero"}
OUT_COLOURS = 5  # --out-0 … --out-4 in the page's style sheet
_SYMBOLS = ("circle", "square", "diamond")
_DASHES = ("dot", "dash", "solid")


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure: an id in the page, a title, its meaning, plotly traces and layout."""

    key: str
    title: str
    meaning: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    tall: bool = False


def unit(evaluation: Evaluation) -> str:
    """What single figures are of: rows, or the pixels of images."""
    return "rows" if evaluation.dense is None else "pixels"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage, ``12.3 %``."""
    return f"{number(100 * share, f'.{digits}f')} %"


def level_percent(alpha: float) -> str:
    """The coverage level 1-alpha as a percentage: ``90 %``, ``99.9 %``."""
    return f"{round(100 * (1 - alpha), 8):g} %"


def number(value: float, form: str) -> str:
    """A formatted number with a real minus sign."""
    return format(value, form).replace("-", "−")


def colour(system: System, i: int) -> str:
    return "var(--hedged)" if system.name == HEDGED else f"var(--system-{i})"


def line(system: System, i: int, **more: Any) -> dict[str, Any]:
    style = 2 if system.name == HEDGED else i % 2
    return {
        "type": "scatter",
        "name": system.name,
        "line": {"color": colour(system, i), "dash": _DASHES[style], "width": 2},
        "marker": {"color": colour(system, i), "symbol": _SYMBOLS[style], "size": 8},
        **more,
    }


def band(x: list[float], low: list[float], high: list[float], name: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": name,
        "mode": "lines",
        "x": [*x, *reversed(x)],
        "y": [*low, *reversed(high)],
        "fill": "toself",
        "fillcolor": "var(--band)",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def guide(x: list[float], y: list[float], name: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": name,
        "mode": "lines",
        "x": x,
        "y": y,
        "line": {"color": "var(--muted)", "width": 1},
        "showlegend": False,
        "hoverinfo": "skip",
    }


def axes(x: str, y: str, *, xaxis: Any = None, yaxis: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}, **(xaxis or {})},
        "yaxis": {"title": {"text": y}, **(yaxis or {})},
        **more,
    }


def outline(histogram: Histogram, name: str, colour: str, dash: str) -> dict[str, Any]:
    shares = histogram.shares[name]
    return {
        "type": "scatter",
        "name": name,
        "mode": "lines",
        "x": [histogram.edges[0], *histogram.edges],
        "y": [0, *shares, 0],
        "line": {"shape": "hv", "color": colour, "width": 2, "dash": dash},
        "hovertemplate": "from %{x:.4g}: %{y:.1%}",
    }
