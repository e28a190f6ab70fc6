"""``hedged control``: settings whose risk is bounded, from a table of losses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table as Lines

from hedged.commands import console
from hedged.commands.console import option

if TYPE_CHECKING:
    from calibration.conformal.losses import Order
    from calibration.conformal.risk_control import RiskControl
    from posthoc.contract import Array

_SHOWN = 30  # settings in the table
_MORE = """LOSSES has a row for each item (an image, a document, a customer) and a column for each
setting, such as a threshold: what the item loses there, between 0 and --bound. Settings must be
fixed without these rows, and the rows be drawn as new items will be.

Without --delta: conformal risk control, for losses that never rise from one column to the next;
the mean loss of a new item is at most --level. With it: learn-then-test, for any losses; with
probability 1 - delta every setting found admissible has a mean loss of at most --level. Without
--order all settings are tested at once; in an order, one after the other until one fails. The
order is 'falling' (from the last column to the first), 'auto' (a quarter of the rows is set aside
for it), or a file with the losses of other rows. Where nothing passes, it says so, and "setting"
in the JSON is null.

\b
Examples:
  hedged control losses.parquet --level .1
  hedged control losses.csv --level .1 --delta .05 --order falling
  hedged control losses.npz --level .2 --delta .1 --order other.npz \\
      --cost 3,2,1,2

Each option is also a variable: HEDGED_CONTROL_LEVEL for --level.
"""


def control(
    losses: Annotated[Path, typer.Argument(help="Table: a row an item, a column a setting")],
    level: Annotated[float, option(help="Largest mean loss")],
    delta: Annotated[
        float | None, option(help="Chance that the promise fails; default: hold in the mean")
    ] = None,
    bound: Annotated[float, option(help="Largest possible loss of an item")] = 1.0,
    columns: Annotated[str, option(help="The settings: a,b; default: every column")] = "",
    order: Annotated[
        str | None, option(help="falling, auto, or a table of other rows' losses")
    ] = None,
    cost: Annotated[
        str | None, option(help="Cost of each setting: 3,2,1; default: the first is the cheapest")
    ] = None,
    binary: Annotated[
        bool, option("--binary", help="A loss is 0 or the bound by nature: exact p-values")
    ] = False,
    monotonise: Annotated[
        bool, option("--monotonise", help="Count an item's largest loss from a column on")
    ] = False,
    seed: Annotated[int, option(min=0, help="Which rows --order auto sets aside")] = 0,
    json: Annotated[bool, option("--json", help="Print what was found as JSON")] = False,
) -> None:
    """Find settings whose mean loss is bounded, with a guarantee."""
    from hedged import control_risk

    x, names = _read(losses, columns)
    found = control_risk(
        x,
        level,
        delta=delta,
        bound=bound,
        settings=names,
        cost=None if cost is None else console.numbers(cost, "--cost"),
        order=_order(order, losses, names),
        binary=True if binary else None,
        monotonise=monotonise,
        seed=seed,
    )
    if json:
        console.print_json(found.as_dict())
    else:
        _show(found)


control.__doc__ = f"{control.__doc__}\n\n{_MORE}"


def _order(order: str | None, losses: Path, names: tuple[str, ...]) -> Order | None:
    from posthoc.contract import DataError
    from posthoc.tables import open_table

    if order is None or order == "auto" or order == "falling":
        return order  # type: ignore[return-value]
    if open_table(order).fingerprint() == open_table(losses).fingerprint():
        raise DataError(f"--order {order}: these are the same rows; an order comes from others")
    return _read(Path(order), ",".join(names))[0]


def _read(path: Path, columns: str) -> tuple[Array, tuple[str, ...]]:
    """Losses n×L and the names of their columns; a single column of lists holds all L."""
    import numpy as np

    from posthoc.columns import decoded, dense
    from posthoc.contract import DataError
    from posthoc.tables import open_table

    table = open_table(path)
    names = tuple(c for c in columns.split(",") if c) or table.columns
    (batch,) = table.batches(table.n_rows, names)
    kinds = {str(decoded(batch.column(name)).type) for name in names}
    whole = all(k == "bool" or "int" in k for k in kinds)
    found = []
    for name in names:
        shape = (-1,) if len(names) == 1 else ()
        values, faults = dense(batch.column(name), name, "float64", shape)
        if faults:
            row, fault = min(faults.items())
            raise DataError(f"{path}: column {name!r}, row {row}: {fault}")
        found.append(values.reshape(len(values), -1))
    x = np.concatenate(found, axis=1)
    if len(names) == 1 and x.shape[1] > 1:
        names = tuple(map(str, range(x.shape[1])))
    return x.astype(np.int64) if whole else x, names


def _show(found: RiskControl) -> None:
    say = console.out.print
    what = f"{found.method}, {found.n:,} items (needs {found.n_needed:,})"
    if found.test is not None:
        what += f"; {found.test} p-values, {found.correction}"
    if found.monotonised:
        what += "; an item's loss counts as its largest from a setting on"
    lines = Lines(title=what, title_justify="left")
    for column in ("setting", "mean loss", "p-value", "admissible"):
        if column != "p-value" or found.pvalues is not None:
            lines.add_column(column)
    step = -(-len(found.settings) // _SHOWN)
    for i, name in enumerate(found.settings):
        if i % step and i != found.chosen:
            continue
        mark = "chosen" if i == found.chosen else "yes" if i in found.admissible else ""
        p = () if found.pvalues is None else (f"{found.pvalues[i]:.3g}",)
        lines.add_row(name, f"{found.risks[i]:.4g}", *p, mark)
    say(lines)
    say(found.promise)
