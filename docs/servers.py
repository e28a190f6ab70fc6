"""The picture of the servers: ``python -m docs.servers [OUTPUT]``.

OUTPUT is what ``python -m bench http --json`` printed, kept as bench/results/http.json; without it
the picture is drawn anew from what is kept.
"""

from __future__ import annotations

import sys
from typing import Any

from docs.drawing import BLUE, GREEN, INK, PURPLE, box, dot, draw, heading, line, text

# Starlette and nothing else is no server of models: what ours has for a floor.
SIDES = (
    ("ours", "hedged", BLUE),
    ("starlette", "Starlette, nothing else", "#cbd2d9"),
    ("mlserver", "MLServer", GREEN),
    ("mlserver batching", "MLServer, batching", "#5eada6"),
    ("bentoml", "BentoML", PURPLE),
)
LEFT, RIGHT, HIGH = 190.0, 640.0, 17.0


def throughput(found: dict[str, Any], top: float) -> tuple[list[str], float]:
    """Answers a second of every side by connections, least and most over the rounds as a line."""
    made = heading(
        top,
        "Answers a second",
        "tabular model of ten columns, one row a request, one worker each, wrk on the same "
        "machine; the line is the least and the most",
    )
    sides = found["tabular"]["sides"]
    most = max(side[c]["high"] for side in sides.values() for c in side)
    y = top + 54
    for connections in sides["ours"]:
        noun = "connection" if connections == "1" else "connections"
        made.append(text(10, y + 13, f"{connections} {noun}", font_weight=600))
        y += HIGH
        for name, said, colour in SIDES:
            it = sides[name][connections]
            at = {k: LEFT + (RIGHT - LEFT) * it[k] / most for k in ("per_second", "low", "high")}
            made.append(text(LEFT - 8, y + 12, said, anchor="end"))
            made.append(box(LEFT, y + 2, at["per_second"] - LEFT, HIGH - 4, colour))
            middle = y + HIGH / 2
            made.append(line([(at["low"], middle), (at["high"], middle)], INK))
            made.append(text(max(at.values()) + 6, y + 12, f"{it['per_second']:,.0f}"))
            y += HIGH
        y += 8
    return made, y + 6


def latency(found: dict[str, Any], top: float) -> tuple[list[str], float]:
    """Median and slowest hundredth of requests one after the other."""
    tails = found["tabular"]["tail"]
    made = heading(
        top,
        "One request after the other",
        "median (full) and 99 % (hollow) of each side's requests, in milliseconds",
    )
    most = max(tail["p99_s"] for tail in tails.values())
    y = top + 48
    for name, said, colour in SIDES:
        if (tail := tails.get(name)) is None:
            continue
        x50, x99 = (LEFT + (RIGHT - LEFT) * tail[k] / most for k in ("p50_s", "p99_s"))
        middle = y + HIGH / 2
        made.append(text(LEFT - 8, y + 12, f"{said}, {tail['requests']:,}", anchor="end"))
        made.append(line([(x50, middle), (x99, middle)], colour))
        made += [dot(x50, middle, colour, 4, 1), dot(x99, middle, colour, 4, 1)]
        made.append(dot(x99, middle, "#ffffff", 2.5, 1))
        both = f"{1e3 * tail['p50_s']:.2f}, {1e3 * tail['p99_s']:.2f}"
        made.append(text(x99 + 10, y + 12, both))
        y += HIGH
    return made, y + 12


if __name__ == "__main__":
    draw("http", (throughput, latency), sys.argv[1:])
