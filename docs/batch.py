"""The picture of batch scoring: ``python -m docs.batch [OUTPUT]``.

OUTPUT is what ``python -m bench batch --json`` printed, kept as bench/results/batch.json; without
it the picture is drawn anew from what is kept.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from docs.drawing import BAD, BLUE, FAINT, GREEN, INK, box, dot, draw, heading, line, text

PANELS = (
    ("seconds_per_million", "seconds a million rows", BLUE),
    ("peak_mb", "most resident memory, MiB", GREEN),
)
LOOPS = (("loop", "tabular"), ("loop_image", "digits"))


def growth(found: dict[str, Any], top: float) -> tuple[list[str], float]:
    """Cost of a row and memory by the number of rows, a panel each."""
    tall, wide = 150.0, 320.0
    made = heading(
        top,
        "As the data set grows",
        "hedged score of the small tabular model, every field written, one thread, by rows in "
        f"the data set; the start, {found['start_s']:.1f} s, is apart",
    )
    for i, (name, said, colour) in enumerate(PANELS):
        held = {int(n): v for n, v in found[name].items()}
        most = max(held.values()) * 1.15
        x0, y0 = 60 + i * (wide + 60), top + 80
        sizes = [math.log10(n) for n in held]
        low, high = min(sizes), max(sizes)

        def at(
            n: int, v: float, x0: float = x0, y0: float = y0,
            low: float = low, high: float = high, most: float = most,
        ) -> tuple[float, float]:  # fmt: skip
            share = (math.log10(n) - low) / (high - low)
            return x0 + 25 + share * (wide - 50), y0 + tall * (1 - v / most)

        made.append(box(x0, y0, wide, tall, "#f5f7fa"))
        made.append(text(x0, y0 - 8, said, font_weight=600))
        points = [at(n, v) for n, v in held.items()]
        made.append(line(points, colour))
        for (x, y), (n, v) in zip(points, held.items(), strict=True):
            made.append(dot(x, y, colour, 4, 1))
            made.append(text(x, y - 9, f"{v:,.3g}" if v < 100 else f"{v:,.0f}", anchor="middle"))
            last = math.log10(n) == high  # and longest: it ends where the panel does
            edge, anchor = (x0 + wide, "end") if last else (x, "middle")
            made.append(text(edge, y0 + tall + 16, f"{n:,}", anchor=anchor, fill=FAINT))
    return made, top + 80 + tall + 40


def speed(found: dict[str, Any], top: float) -> tuple[list[str], float]:
    """Seconds of `hedged score` beside those of the loops, and of one and two Ray workers."""
    left, right, high = 190.0, 640.0, 18.0
    made = heading(top, "Beside others, same run")
    y = top + 34
    for key, name in LOOPS:
        it = found[key]
        sides = (
            ("hedged score", it["ours"]["median_s"], BLUE, f"{found[f'ratio_vs_ort_{key}']:.2f}"),
            ("loop by hand", it["peer"]["median_s"], FAINT, "1"),
            ("  that keeps nothing", it["without_writing"]["median_s"], "#cbd2d9", ""),
        )
        y = _bars(made, y, f"{name}, {it['rows']:,} rows", sides, left, right, high)
    it = found["workers"]
    starts = [it[name]["median_s"] for name in ("start_one", "start_two")]
    one, two = it["peer"]["median_s"] - starts[0], it["ours"]["median_s"] - starts[1]
    sides = (
        ("one Ray worker", one, FAINT, "1"),
        ("two", two, BLUE, f"{found['ratio_two_workers']:.2f}"),
    )
    title = f"magika on Ray, {it['rows']:,} rows, starts of {starts[0]:.0f} s taken off"
    y = _bars(made, y, title, sides, left, right, high)
    return made, y + 6


def _bars(
    made: list[str],
    y: float,
    title: str,
    sides: tuple[tuple[str, float, str, str], ...],
    left: float,
    right: float,
    high: float,
) -> float:
    most = max(seconds for _, seconds, _, _ in sides)
    made.append(text(10, y + 13, title, font_weight=600))
    made.append(text(right + 150, y + 13, "times as fast", anchor="end", fill=FAINT))
    y += high + 2
    for name, seconds, colour, ratio in sides:
        wide = (right - left) * seconds / most
        made.append(text(left - 8, y + 13, name, anchor="end"))
        made.append(box(left, y + 2, wide, high - 4, colour))
        made.append(text(left + wide + 6, y + 13, f"{seconds:.2f} s"))
        less = ratio not in ("", "1") and float(ratio) < 0.9
        made.append(text(right + 150, y + 13, ratio, anchor="end", fill=BAD if less else INK))
        y += high
    return y + 12


if __name__ == "__main__":
    draw("batch", (growth, speed), sys.argv[1:])
