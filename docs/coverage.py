"""The picture of coverage: ``python -m docs.coverage [OUTPUT]``.

OUTPUT is what ``python -m bench coverage --json`` printed, kept as bench/results/coverage.json;
without it the picture is drawn anew from what is kept.
"""

from __future__ import annotations

import sys
from typing import Any

from docs.drawing import (
    BAD,
    BLUE,
    FAINT,
    GREEN,
    INK,
    PURPLE,
    box,
    dot,
    draw,
    heading,
    line,
    text,
)

BAND = "#e3eef9"
FORMS = {"unweighted": BAD, "estimated": BLUE, "bbse": PURPLE, "oracle": GREEN}
LIBRARIES = {"torch-uncertainty": BAD, "mapie": PURPLE, "torchcp": BLUE, "hedged": GREEN}
SHIFTS = {
    "feature": "along a feature",
    "doubt": "harder rows",
    "target": "classes, targets",
}


def cells(found: dict[str, Any], top: float) -> tuple[list[str], float]:
    """Every cell of 500 rows and more in the law of its sizes, a row for each method."""
    left, right, high = 190.0, 620.0, 17.0
    rows = [m for m in found["methods"] if m["cells"]]

    def at(z: float) -> float:
        return left + (z + 5) / 10 * (right - left)

    share = found["cells_inside_band"]
    made = [
        *heading(
            top,
            "Coverage of sets and intervals",
            f"{found['cells']:,} cells (set × level × split), each where it lies in the law of its "
            f"sample sizes; {share:.1%} are inside the 99 % band",
        ),
        text(right + 20, top + 60, "outside", fill=FAINT),
        text(right + 75, top + 60, "chance allows", fill=FAINT),
    ]
    start = top + 68
    made.append(box(at(-2.576), start, at(2.576) - at(-2.576), high * len(rows), BAND))
    for i, m in enumerate(rows):
        y = start + i * high
        made.append(text(left - 8, y + 13, m["method"], anchor="end"))
        most = max(m["positions"])
        step = (right - left) / len(m["positions"])
        for j, count in enumerate(m["positions"]):
            z = -5 + (j + 0.5) * 10 / len(m["positions"])
            if count:
                tall = max(1.5, (high - 3) * count / most)
                beyond = z < -2.576 or (z > 2.576 and not m["lower_edge_only"])
                colour = BAD if beyond else FAINT if z > 2.576 else BLUE
                made.append(box(left + j * step, y + high - tall, step - 1, tall, colour))
        made.append(text(right + 50, y + 13, str(m["outside"]), anchor="end"))
        made.append(text(right + 120, y + 13, str(m["allowed"]), anchor="end", fill=FAINT))
    end = start + high * len(rows)
    for z in (-4, -2, 0, 2, 4):
        made.append(line([(at(z), start), (at(z), end)], "#ffffff" if z else FAINT, 1))
        made.append(text(at(z), end + 16, f"{z:+d}" if z else "as promised", anchor="middle"))
    said = "s.d. below and above what is promised; grey: ties or sets never empty, allowed"
    made.append(text(at(0), end + 33, said, anchor="middle", fill=FAINT))
    return made, end + 50


def shift(found: dict[str, Any], top: float) -> tuple[list[str], float]:
    """Realised less nominal coverage of each set at .1 under shift, a row for each form."""
    left, right, high = 190.0, 620.0, 18.0
    low, most = -0.3, 0.1

    def at(v: float) -> float:
        return left + (min(max(v, low), most) - low) / (most - low) * (right - left)

    made = [
        *heading(
            top,
            "Under simulated shift",
            "mean coverage of each set over its splits, less .9; rows twice or half as likely at "
            "one s.d.",
        ),
        text(right + 20, top + 60, "mean", fill=FAINT),
    ]
    y = top + 66
    start = y
    for name, said in SHIFTS.items():
        rows = [r for r in found["shift"]["table"] if r["shift"] == name and r["alpha"] == 0.1]
        for i, (form, colour) in enumerate(FORMS.items()):
            held = [r[form]["coverage"] for r in rows if form in r]
            held = [v - 0.9 for v in held if v is not None]
            if not held:
                continue
            made.append(text(left - 8, y + 13, form, anchor="end"))
            if not i:
                made.append(text(10, y + 13, said, font_weight=600))
            made += [dot(at(v), y + 9, colour) for v in held]
            made.append(text(right + 52, y + 13, f"{sum(held) / len(held):+.3f}", anchor="end"))
            y += high
        y += 8
    made.append(line([(at(0), start), (at(0), y)], INK, 1))
    made.append(line([(at(-0.02), start), (at(-0.02), y)], FAINT, 1, "3 3"))
    for v in (-0.3, -0.2, -0.1, 0.0, 0.1):
        made.append(text(at(v), y + 15, f"{v:+.1f}" if v else "as promised", anchor="middle"))
    return made, y + 32


def peers(found: dict[str, Any], top: float) -> tuple[list[str], float]:
    """Coverage at .1 against the number of conformal rows, a panel for each score and pool."""
    table = [r for r in found["peers"]["table"] if r["alpha"] == 0.1]
    pools = list(dict.fromkeys(r["pool"] for r in table))
    scores = list(dict.fromkeys(r["score"] for r in table))
    sizes = sorted({r["n"] for r in table})
    low, most, tall, wide = 0.84, 0.98, 130.0, 225.0
    made = heading(
        top,
        "With few conformal rows",
        f"mean coverage of {found['peers']['splits']:,} splits at α = .1, for "
        f"{', '.join(f'{n:,}' for n in sizes)} rows; grey: ⌈(n+1)(1-α)⌉/(n+1), what is right",
    )
    x = 10.0
    for name, colour in LIBRARIES.items():
        made += [dot(x + 5, top + 52, colour, 4, 1), text(x + 14, top + 56, name)]
        x += 30 + 7 * len(name)
    for a, pool in enumerate(pools):
        for b, score in enumerate(scores):
            x0, y0 = 50 + b * (wide + 25), top + 90 + a * (tall + 50)

            def at(i: float, v: float, x0: float = x0, y0: float = y0) -> tuple[float, float]:
                clipped = min(max(v, low), most)
                return (
                    x0 + 15 + i * (wide - 30) / (len(sizes) - 1),
                    y0 + tall - (clipped - low) / (most - low) * tall,
                )

            made.append(box(x0, y0, wide, tall, "#f5f7fa"))
            made.append(text(x0, y0 - 7, f"{score}, {pool}", font_weight=600))
            here = [r for r in table if r["pool"] == pool and r["score"] == score]
            right = {r["n"]: r["expected"] for r in here}
            made.append(line([at(i, right[n]) for i, n in enumerate(sizes)], FAINT, 5))
            made.append(line([at(-0.1, 0.9), at(len(sizes) - 0.9, 0.9)], INK, 1, "3 3"))
            for name, colour in LIBRARIES.items():
                held = {r["n"]: r["coverage"] for r in here if r["library"] == name}
                if held:
                    points = [at(i, held[n]) for i, n in enumerate(sizes)]
                    made += [line(points, colour), *(dot(*p, colour, 3, 1) for p in points)]
            for i, n in enumerate(sizes):
                x, y = at(i, low)
                made.append(text(x, y + 15, f"{n:,}", anchor="middle", fill=FAINT))
            for v in (0.85, 0.9, 0.95):
                x, y = at(0, v)
                made.append(text(x0 - 6, y + 4, f"{v:.2f}"[1:], anchor="end", fill=FAINT))
    return made, top + 80 + len(pools) * (tall + 50)


if __name__ == "__main__":
    draw("coverage", (cells, shift, peers), sys.argv[1:])
