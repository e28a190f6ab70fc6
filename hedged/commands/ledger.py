"""``hedged ledger``: what a ledger holds, and what shall leave it."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hedged.commands import console
from hedged.commands.ages import seconds
from hedged.commands.console import option

if TYPE_CHECKING:
    from service.upkeep import Upkeep

_MORE = """LEDGER is the SQLite file or the postgresql:// URL of a service, which may go on writing
meanwhile. `info` counts what is in it. `purge` deletes predictions that are older than a time,
with their labels, and labels that have waited as long for a prediction; a service does so by
itself after HEDGED_RETENTION_DAYS. `forget` erases predictions and their labels by id, as DELETE
/v1/predictions/{id} does; exit code 1 where an id is not there. Freed pages of a SQLite file are
used again; the file does not shrink.

\b
Examples:
  hedged ledger info hedged-ledger.sqlite
  hedged ledger purge hedged-ledger.sqlite --older-than 90d
  hedged ledger forget hedged-ledger.sqlite order-17 order-18
"""


class Action(StrEnum):
    """What to do with the ledger."""

    info = "info"
    purge = "purge"
    forget = "forget"


def ledger(
    action: Annotated[Action, typer.Argument(help="info, purge or forget")],
    ledger: Annotated[str, typer.Argument(help="SQLite file, or postgresql:// URL")],
    ids: Annotated[list[str] | None, typer.Argument(help="Of forget: prediction ids")] = None,
    older_than: Annotated[
        str | None, option(help="Of purge: age such as 90d, 36h or 2w (s, m, h, d, w)")
    ] = None,
    model: Annotated[
        str | None, option(help="Of forget: only this model's; default: of any")
    ] = None,
    json: Annotated[bool, option("--json", help="Print what was found or done as JSON")] = False,
) -> None:
    """Say what a ledger holds; delete what is old, or what must go."""
    from service.upkeep import opened

    if bool(ids) != (action is Action.forget):
        raise typer.BadParameter("forget needs one ID or more, and nothing else takes any")
    if (older_than is not None) != (action is Action.purge):
        raise typer.BadParameter("purge needs --older-than, and nothing else takes it")
    if model is not None and action is not Action.forget:
        raise typer.BadParameter("only forget takes --model")
    age = 0.0 if older_than is None else seconds(older_than, "--older-than")
    with opened(ledger) as found:
        if action is Action.info:
            _show(found.info(), json)
        elif action is Action.purge:
            _purge(found, age, json)
        else:
            _forget(found, ids or [], model, json)


ledger.__doc__ = f"{ledger.__doc__}\n\n{_MORE}"


def _purge(ledger: Upkeep, age: float, json: bool) -> None:
    with console.progress() as report:
        gone, waited = ledger.purge(age, lambda done: report("removed", done, done))
    if json:
        console.print_json({"predictions": gone, "expired_labels": waited})
    else:
        console.out.print(
            f"{gone:,} predictions removed, with their labels, and {waited:,} labels that waited"
        )


def _forget(ledger: Upkeep, ids: list[str], model: str | None, json: bool) -> None:
    found = ledger.forget(ids, model)
    if json:
        console.print_json({"forgotten": found})
    else:
        console.out.print(f"{sum(found.values()):,} predictions erased")
    if unknown := [id for id, n in found.items() if n == 0]:
        console.err.print(f"no such prediction: {', '.join(unknown)}")
        raise typer.Exit(1)


def _show(info: dict[str, Any], json: bool) -> None:
    if json:
        console.print_json(info)
        return
    say = console.out.print
    say(
        f"{info['predictions']:,} predictions, {info['images']:,} images, {info['labels']:,} "
        f"labels ({info['pending']:,} pending), {info['bytes'] / 1e6:,.1f} MB, "
        f"revision {info['revision']}"
    )
    table = Table()
    for column in ("model", "version", "predictions", "images", "oldest", "newest"):
        table.add_column(column, overflow="fold")
    for m in info["models"]:
        times = (_time(m["oldest"]), _time(m["newest"]))
        counts = (f"{m['predictions']:,}", f"{m['images']:,}")
        table.add_row(m["model"], m["version"], *counts, *times)
    say(table)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")
