"""``hedged labels``: labels in bulk, from a file into a ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hedged.commands import console
from hedged.commands.console import option

if TYPE_CHECKING:
    from service.labelfile import Columns, LabelFile, Row
    from service.rows import Source

_RESULTS = ("accepted", "pending", "duplicate", "conflict", "invalid")
_MORE = """FILE is .parquet, .csv, .ndjson or .jsonl, of any length. A label is a class name or
index, a number, or a list of numbers. The labels are in the ledger when this ends; its service
counts them within a second, or when it starts.

accepted: its prediction is there. pending: it waits for its prediction. duplicate: the same label
is there, so that a run that was stopped is simply run again. conflict: another label is there, and
stays. invalid: the id, the model or the label cannot be right. Exit code 1 where a row is invalid
or in conflict; --rejected FILE has these rows as NDJSON with the reason. Exit code 75: the store
was away; run it again.

\b
Examples:
  hedged labels hedged-ledger.sqlite truth.parquet
  hedged labels postgresql://localhost/hedged truth.csv --id order \\
      --label outcome --model churn --rejected rejected.ndjson

Each option is also a variable: HEDGED_LABELS_MODEL for --model.
"""


class LabelAs(StrEnum):
    """What a label in CSV is that reads as a number."""

    auto = "auto"
    name = "name"
    number = "number"


def labels(
    ledger: Annotated[str, typer.Argument(help="SQLite file, or postgresql:// URL")],
    file: Annotated[Path, typer.Argument(help="Parquet, CSV or NDJSON")],
    id: Annotated[str, option("--id", help="Column of prediction ids")] = "id",
    label: Annotated[str, option("--label", help="Column of labels")] = "label",
    model: Annotated[
        str | None,
        option(help="Model of every row; default: the column 'model', else the ledger's own"),
    ] = None,
    label_as: Annotated[
        LabelAs | None,
        option(help="In CSV, what reads as a number is: auto (a number), number, or name"),
    ] = None,
    rejected: Annotated[Path | None, option(help="File for the rows that did not go in")] = None,
    json: Annotated[bool, option("--json", help="Print the counts as JSON")] = False,
) -> None:
    """Put labels from a file into a ledger."""
    from service.bulk import load
    from service.labelfile import LabelFile
    from service.upkeep import opened

    table = LabelFile(file)
    columns = _columns(table, id, label, model)
    if label_as is not None and table.kind != ".csv":
        raise typer.BadParameter("--label-as is for CSV; other files say what is a text")
    if rejected is not None and rejected.exists() and rejected.samefile(file):
        raise typer.BadParameter("--rejected would write over FILE")
    start = time.monotonic()
    with opened(ledger) as found, _rejects(rejected) as reject, console.progress() as report:
        if table.kind == ".csv" and label_as in (None, LabelAs.auto):
            _check_names(found.sources(), model)
        counts = load(
            found,
            table.parts(columns, names=label_as is LabelAs.name),
            model=model,
            tell=lambda done, total: report("labels", done, total),
            reject=reject,
        )
    seconds = time.monotonic() - start
    result = {
        "rows": counts.total(),
        "counts": {name: counts[name] for name in _RESULTS},
        "rejected": None if rejected is None else str(rejected),
        "seconds": seconds,
    }
    if json:
        console.print_json(result)
    else:
        _show(result)
    if counts["invalid"] or counts["conflict"]:
        raise typer.Exit(1)


labels.__doc__ = f"{labels.__doc__}\n\n{_MORE}"


def _columns(file: LabelFile, id: str, label: str, model: str | None) -> Columns:
    from posthoc.contract import DataError
    from service.labelfile import Columns

    there = file.columns()
    for name in (id, label):
        if name not in there:
            raise DataError(f"{file.path}: no column {name!r}; it has {', '.join(there)}")
    return Columns(id, label, "model" if model is None and "model" in there else None)


def _check_names(sources: list[Source], model: str | None) -> None:
    """A class called 3 need not be the class of index 3."""
    from posthoc.contract import DataError
    from service.labelfile import is_number

    for source in sources:
        for name in source.classes or ():
            if model in (None, source.model) and is_number(name):
                raise DataError(
                    f"{source.model} has a class named {name!r}: say what numbers in the file are, "
                    "--label-as name or --label-as number (class indices)"
                )


@contextmanager
def _rejects(path: Path | None) -> Iterator[Callable[[Row, str, str], None]]:
    """Writes rows that did not go in, one JSON object a line."""
    import orjson

    if path is None:
        yield lambda *_: None
        return
    try:
        file = path.open("wb")
    except OSError as e:
        raise typer.BadParameter(f"--rejected {path}: {e.strerror}") from None
    with file:

        def reject(row: Row, result: str, reason: str) -> None:
            record = {"row": row.number, "id": row.id, "label": row.label, "model": row.model}
            file.write(orjson.dumps(record | {"result": result, "reason": reason}) + b"\n")

        yield reject


def _show(result: dict[str, Any]) -> None:
    table = Table()
    table.add_column("result")
    table.add_column("labels", justify="right")
    for name, n in result["counts"].items():
        table.add_row(name, f"{n:,}")
    console.out.print(table)
    rate = result["rows"] / max(result["seconds"], 1e-9)
    console.out.print(f"{result['rows']:,} labels in {result['seconds']:.1f} s ({rate:,.0f}/s)")
