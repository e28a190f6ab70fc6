"""The tables of the developer suite: real rows as float32 columns, a target, sometimes a group.

Text columns become one column of 0 and 1 for each frequent level; a missing number becomes the
median beside a column that says so. Equal rows are kept once: a row that a network was trained on
must not come back among the rows that it never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bench.assets import fetch, r_data
from posthoc.contract import HedgedError

LEVELS = 20  # of a text column; rarer ones share all zeros
MISSING = "missing"


def numeric(
    frame: Any, target: str, *, group: str | None = None, drop: Sequence[str] = ()
) -> pa.Table:
    """A pandas frame as float32 inputs, then ``group`` (text), then ``target``.

    A target of text becomes int64 indices of its sorted values (classification), one of numbers
    float32; rows without it are left out. Raises HedgedError for a column that is not there.
    """
    for name in (target, *drop, *([] if group is None else [group])):
        if name not in frame.columns:
            raise HedgedError(f"no column {name!r}; the frame has {', '.join(frame.columns)}")
    frame = frame.drop(columns=list(drop)).dropna(subset=[target]).drop_duplicates()
    columns: dict[str, NDArray[Any]] = {}
    for name in frame.columns:
        if name not in (target, group):
            columns |= _inputs(name, frame[name])
    if group is not None:
        columns[group] = frame[group].astype(str).to_numpy(object)
    values = frame[target].to_numpy()
    if _is_number(values):
        columns[target] = values.astype(np.float32)
    else:
        columns[target] = np.unique(values.astype(str), return_inverse=True)[1].astype(np.int64)
    return pa.table({name: pa.array(v) for name, v in columns.items()})


def share(
    table: pa.Table, fraction: float, group: str | None = None, seed: int = 0
) -> tuple[pa.Table, pa.Table]:
    """(rows to train on, the others), drawn at random; rows of one ``group`` stay together."""
    rng = np.random.default_rng(seed)
    items = np.arange(table.num_rows)
    if group is not None:
        items = np.unique(table[group].to_numpy(), return_inverse=True)[1]
    n = int(items.max()) + 1
    chosen = np.zeros(n, bool)
    chosen[rng.permutation(n)[: round(fraction * n)]] = True
    order = rng.permutation(table.num_rows)
    picked = chosen[items[order]]
    return table.take(order[picked]), table.take(order[~picked])


def keel(name: str) -> pa.Table:
    """A classification table of the KEEL repository: x1, x2, … and ``label``."""
    return numeric(_keel(name), "label")


def letters(held_out: str, *, strange: bool = False) -> pa.Table:
    """KEEL's letter without some letters, or (``strange``) those letters' rows alone."""
    frame = _keel("letter")
    return numeric(frame[frame["label"].isin(list(held_out)) == strange], "label")


def churn() -> pa.Table:
    """Customers of a telephone company, and whether they left."""
    return numeric(r_data("modeldata", "wa_churn"), "churn")


def deliveries() -> pa.Table:
    """Minutes until a meal arrived: noisier, the longer."""
    return numeric(r_data("modeldata", "deliveries"), "time_to_delivery")


def hotel_rates() -> pa.Table:
    """Price of a hotel room a night."""
    frame = r_data("modeldata", "hotel_rates")
    return numeric(frame, "avg_price_per_room", drop=["arrival_date"])  # arrival_date_num is kept


def weather() -> pa.Table:
    """Hourly temperature (°F) at New York's three airports; ``date`` is the group."""
    frame = r_data("nycflights13", "weather")
    frame["date"] = frame["month"].astype(str) + "-" + frame["day"].astype(str)
    # Humidity and dew point together would give the temperature by a formula.
    return numeric(frame, "temp", group="date", drop=["year", "time_hour", "humid"])


def storms() -> pa.Table:
    """Air pressure (mbar) in the eye of Atlantic storms every six hours; ``storm`` is the group."""
    frame = r_data("dplyr", "storms")
    frame["storm"] = frame["name"] + " " + frame["year"].astype(str)  # names come again
    return numeric(frame, "pressure", group="storm", drop=["name"])


def nox() -> pa.Table:
    """Log concentration of nitrogen oxides beside a motorway, hour by hour."""
    return numeric(r_data("robustbase", "NOxEmissions"), "LNOx")


def bikeshare() -> pa.Table:
    """Bicycles hired in an hour in Washington."""
    import pandas as pd

    frame = pd.read_csv(fetch("bikeshare") / "Bikeshare.csv")
    return numeric(frame, "bikers", drop=["casual", "registered"])  # those two sum to it


def concrete() -> pa.Table:
    """Compressive strength of concrete (MPa) by its mixture and age."""
    return numeric(r_data("modeldata", "concrete"), "compressive_strength")


def _keel(name: str) -> Any:
    import pandas as pd

    frame = pd.read_csv(fetch("keel") / f"{name}.dat", header=None, skipinitialspace=True)
    frame.columns = [*(f"x{i + 1}" for i in range(frame.shape[1] - 1)), "label"]
    return frame.astype({"label": str})


def _inputs(name: str, column: Any) -> dict[str, NDArray[np.float32]]:
    """One column as one or more columns of numbers."""
    values = column.to_numpy()
    if _is_number(values):
        x = values.astype(np.float64)
        gone = np.isnan(x)
        if not gone.any():
            return {name: x.astype(np.float32)}
        filled = np.where(gone, np.nanmedian(x), x)
        return {
            name: filled.astype(np.float32),
            f"{name} {MISSING}": gone.astype(np.float32),
        }
    texts = column.astype(object).where(column.notna(), MISSING).to_numpy(object).astype(str)
    levels, counts = np.unique(texts, return_counts=True)
    frequent = levels[np.argsort(-counts, kind="stable")[:LEVELS]]
    return {f"{name}={level}": (texts == level).astype(np.float32) for level in frequent}


def _is_number(values: NDArray[Any]) -> bool:
    return bool(np.issubdtype(values.dtype, np.number) or values.dtype == bool)
