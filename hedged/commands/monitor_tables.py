"""What ``hedged monitor --once`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from hedged.commands import console


def show(found: Mapping[str, Any], as_json: bool) -> None:
    """Print what `service.monitor.told.told` says, as JSON or as tables."""
    if as_json:
        console.print_json(found)
        return
    console.out.print(_streams(found))
    if found["coverage"]:
        console.out.print(_coverage(found))
    if found["accuracy"]:
        console.out.print(_accuracy(found))
        _assumed(found, "expected", "stratified")
    if found["kinds"]:
        console.out.print(_kinds(found))
        _assumed(found, "kinds")


def _assumed(found: Mapping[str, Any], *names: str) -> None:
    for name in names:
        console.out.print(found["assumes"][name], markup=False)


def _streams(found: Mapping[str, Any]) -> Table:
    table = Table(*("model", "version", "stream", "values", "evidence 10^", "changes", "KS", "PSI"))
    for row in found["streams"]:
        bet, *distances = (_number(row[name]) for name in ("log10_martingale", "ks", "psi"))
        seen = f"{row['seen']:,}" if not row["learning"] else f"learns: {row['reference']:,}"
        shown = [row["model"], row["version"], row["stream"], seen]
        table.add_row(*map(escape, shown), bet, str(row["changes"]), *distances)
    return table


def _coverage(found: Mapping[str, Any]) -> Table:
    table = Table(
        *("model", "version", "level", "in window", "least", "labels", "at most", *_PROMISE)
    )
    for row in found["coverage"]:
        window = row["window"] or {}
        table.add_row(
            *map(escape, (row["model"], row["version"], row["level"])),
            _number(window.get("coverage")),
            _number(window.get("least")),
            f"{row['labelled']:,}",
            _number(row["upper"]),
            *_promised(row["promised"]),
        )
    return table


def _accuracy(found: Mapping[str, Any]) -> Table:
    table = Table(
        *("model", "version", "labels", "accuracy", "expected", "bias", "as served", *_PROMISE)
    )
    for row in found["accuracy"]:
        bias = row["bias"] or {}
        table.add_row(
            *map(escape, (row["model"], row["version"])),
            f"{row['labelled']:,}",
            _number(row["accuracy"]),
            _number(row["expected"]),
            _interval(bias.get("raw")),
            _interval(bias.get("stratified")),
            *_promised(row["promised"]),
        )
    return table


_PROMISE = ("promised", "evidence 10^", "alarm")


def _kinds(found: Mapping[str, Any]) -> Table:
    table = Table(*("model", "version", "latest", "looks like", "strange", "from", "to"))
    for row in found["kinds"]:
        table.add_row(
            *map(escape, (row["model"], row["version"])),
            f"{row['rows']:,}",
            row["kind"].replace("_", " "),
            *(_number(row[name]) for name in ("strange", "low", "high")),
        )
    return table


def _promised(one: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if one is None:
        return "—", "—", "—"
    evidence = _number(one["log10_evidence"])
    return f"≥ {one['floor']:.3g}", evidence, "yes" if one["alarm"] else "no"


def _interval(one: Mapping[str, float] | None) -> str:
    if one is None:
        return "—"
    return f"{one['value']:+.3f} ± {one['upper'] - one['value']:.3f}"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"
