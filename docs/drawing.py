"""Shapes of the pictures that show what a benchmark found, and the files that keep the figures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench.results import RESULTS, keep, kept
from docs.take_pictures import shoot

WIDTH = 800
INK, FAINT, BAD = "#1f2933", "#7b8794", "#c2410c"
BLUE, GREEN, PURPLE = "#2563eb", "#0f766e", "#7c3aed"


Part = Callable[[dict[str, Any], float], tuple[list[str], float]]
"""Shapes of some figures below a height, and the height where they end."""


def draw(name: str, parts: Sequence[Part], arguments: Sequence[str]) -> None:
    """docs/pictures/NAME.png, of parts one below the other.

    The figures are those of the file that the arguments name, which is kept then, and else what is
    kept of the benchmark of that name.
    """
    if arguments:
        keep(json.loads(Path(arguments[0]).read_text()), RESULTS / f"{name}.json")
    found = kept(name)
    assert found is not None, f"no figures of {name} are kept"
    drawn: list[str] = []
    top = 6.0
    for part in parts:
        more, top = part(found, top)
        drawn += more
    _picture(name, drawn, int(top))


def _picture(name: str, drawn: Sequence[str], height: int) -> None:
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'font-family="Inter, Helvetica, Arial, sans-serif">{box(0, 0, WIDTH, height, "#ffffff")}'
        f"{''.join(drawn)}</svg>"
    )
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / f"{name}.html"
        page.write_text(f'<meta charset="utf-8"><body style="margin:0">{svg}')
        shoot(page.as_uri(), name, WIDTH, height, 1.5)


def text(x: float, y: float, said: str, *, anchor: str = "start", **style: Any) -> str:
    """A line of text."""
    given = {"fill": INK, "font-size": 12, "text-anchor": anchor, **style}
    marks = " ".join(f'{k.replace("_", "-")}="{v}"' for k, v in given.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" {marks}>{escape(said)}</text>'


def heading(top: float, title: str, about: str = "") -> list[str]:
    """What a part of a picture begins with."""
    made = [text(10, top + 16, title, font_size=16, font_weight=600)]
    return [*made, text(10, top + 36, about, fill=FAINT)] if about else made


def box(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1.0) -> str:
    """A filled rectangle."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{fill}" fill-opacity="{opacity:.3f}"/>'


def line(points: list[tuple[float, float]], colour: str, width: float = 1.5, dash: str = "") -> str:
    """A line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
        f'stroke-dasharray="{dash}"/>'
    )


def dot(x: float, y: float, colour: str, radius: float = 3.5, opacity: float = 0.75) -> str:
    """A point."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" opacity="{opacity}"/>'
