"""Tables of the report as HTML, and their cells."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from calibration.evaluation.records import Difference, Evaluation, Figure
from calibration.figures.panel import level_percent, number, percent

NONE = "–"


def items(e: Evaluation) -> str:
    """What was resampled: rows, or images."""
    return "rows" if e.dense is None else "images"


def table(head: Iterable[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    """A table of ready cells; ``head`` is escaped here."""
    labels = [escape(h) for h in head]
    top = "".join(f'<th scope="col">{label}</th>' for label in labels)
    body = []
    for name, cells in rows:
        tds = "".join(
            f'<td data-label="{label}"{" class=none" if cell == NONE else ""}>{cell}</td>'
            for label, cell in zip(labels[1:], cells, strict=True)
        )
        body.append(f'<tr><th scope="row">{name}</th>{tds}</tr>')
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def shown(value: float, form: str) -> str:
    """A number in its format; ``%`` for a share."""
    return percent(value, 2) if form == "%" else number(value, form)


def cell(f: Figure | None, form: str) -> str:
    """A figure above its range."""
    if f is None:
        return NONE
    text = shown(f.value, form)
    if f.low is None or f.high is None:
        return text
    span = f"{shown(f.low, form)} to {shown(f.high, form)}"
    return f"{text}<small>{'perfect: ' if f.range == 'perfect' else ''}{span}</small>"


def difference(d: Difference | None, form: str) -> str:
    """A difference above its interval, marked where that leaves out zero."""
    if d is None:
        return NONE
    mark = "" if d.low <= 0 <= d.high else ' class="clear"'
    return (
        f"<span{mark}>{signed(d.value, form)}</span>"
        f"<small>{signed(d.low, form)} to {signed(d.high, form)}</small>"
    )


def parts(e: Evaluation) -> str:
    """Coverage of the named groups and of the worst slice, level by level; empty without any."""
    rows = []
    named = False
    for v in e.levels:
        named = named or bool(v.groups)
        for p in (*((v.worst_slice,) if v.worst_slice else ()), *v.groups):
            cells = [
                level_percent(v.alpha),
                f"{p.n:,}",
                percent(p.coverage, 2),
                f"{percent(p.band_low, 2)} to {percent(p.band_high, 2)}",
            ]
            rows.append((escape(p.name), cells))
    if not rows:
        return ""
    said = (
        "The worst slice is about a tenth of the rows or more, cut along the model's own outputs "
        "where coverage was least on one half, measured on the other. "
    )
    if named:
        said += "Groups: least covered first; among many, one in a hundred lies outside by chance. "
    said += (
        "Only the average over all rows is promised, unless groups have thresholds of their own."
    )
    return f"{table(['Part', 'Level', 'Rows', 'Coverage', 'Chance, 99 %'], rows)}<p>{said}</p>"


def signed(value: float, form: str) -> str:
    """A number in its format with its sign, plus or minus."""
    return f"{'+' if value >= 0 else '−'}{shown(abs(value), form)}"
