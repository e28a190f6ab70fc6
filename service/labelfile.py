"""Labels in a file of any length: Parquet, CSV or NDJSON, read part by part."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from posthoc.contract import DataError
from service.labeltable import cells, fault_of

_ROWS = 10_000  # read at a time, about
_TEXT = 1 << 28  # characters of one column in these
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold what. ``model`` None: the ledger is asked which model an id is of."""

    id: str
    label: str
    model: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """One label as the file has it. ``number`` counts from 1; ``fault`` says why it is none."""

    number: int
    id: Any
    label: Any
    model: str | None
    fault: str | None = None


def is_number(text: str) -> bool:
    """Whether a cell of a CSV file reads as a number."""
    return _NUMBER.fullmatch(text) is not None


class LabelFile:
    """One file of labels; the extension says of which kind. Raises DataError for another one."""

    def __init__(self, path: Path) -> None:
        kinds = {
            ".parquet": _parquet,
            ".csv": _csv,
            ".ndjson": _ndjson,
            ".jsonl": _ndjson,
        }
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        self.path = path
        self.kind = path.suffix.lower()
        if self.kind not in kinds:
            raise DataError(f"{path}: unknown extension; give {', '.join(kinds)}")
        self._read = kinds[self.kind]

    def columns(self) -> tuple[str, ...]:
        """The names of its columns; of NDJSON the keys of its first line."""
        try:
            if self.kind == ".parquet":
                return tuple(pq.read_schema(self.path).names)
            if self.kind == ".csv":
                with pacsv.open_csv(self.path) as reader:
                    return tuple(reader.schema.names)
            with self.path.open("rb") as f:
                first = next((line for line in f if line.strip()), b"{}")
            value = orjson.loads(first)
            return tuple(value) if isinstance(value, dict) else ()
        except (pa.ArrowException, OSError, ValueError) as e:
            raise DataError(f"{self.path} cannot be read: {e}") from None

    def parts(self, columns: Columns, *, names: bool = False) -> Iterator[tuple[list[Row], int]]:
        """Rows, part by part, and about how many rows the file has.

        In CSV a label that reads as a number is one, or with ``names`` the name of a class; a list
        is in brackets. Raises DataError for a missing column, a column that cannot hold labels,
        and a file that turns out to be damaged.
        """
        number = 0
        try:
            for values, share in self._read(self.path, columns, names):
                rows = [Row(number + n, *row) for n, row in enumerate(values, 1)]
                number += len(rows)
                yield rows, max(number, round(number / share)) if share else number
        except (pa.ArrowException, OSError, ValueError) as e:
            raise DataError(f"{self.path}, after row {number}: {e}") from None


# Each of these yields parts of (id, label, model, fault), and the share of the file read so far.
Part = tuple[list[tuple[Any, Any, str | None, str | None]], float]


def _parquet(path: Path, columns: Columns, _: bool) -> Iterator[Part]:
    wanted = [columns.id, columns.label, *([columns.model] if columns.model else [])]
    with pq.ParquetFile(path) as file:
        for role, name in zip(("id", "label", "model"), wanted, strict=False):
            if fault := fault_of(role, file.schema_arrow.field(name).type):
                raise DataError(f"{name!r} as {role}: {fault}")
        done, total = 0, file.metadata.num_rows
        for batch in file.iter_batches(_ROWS, columns=wanted):
            done += batch.num_rows
            yield _rows([cells(batch.column(name), _TEXT) for name in wanted]), done / total


def _csv(path: Path, columns: Columns, names: bool) -> Iterator[Part]:
    wanted = [columns.id, columns.label, *([columns.model] if columns.model else [])]
    # As text: 007 is an id, and what a label is depends on more than the first rows.
    options = pacsv.ConvertOptions(
        include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string())
    )
    size = path.stat().st_size
    with pa.OSFile(str(path)) as file, pacsv.open_csv(file, convert_options=options) as reader:
        for batch in reader:
            ids, labels, *models = (cells(column, _TEXT) for column in batch.columns)
            values = [v or None if names else _value(v) for v in labels]
            yield _rows([ids, values, *models]), min(file.tell() / size, 1)


def _ndjson(path: Path, columns: Columns, _: bool) -> Iterator[Part]:
    size, done = path.stat().st_size, 0
    rows: list[tuple[Any, Any, str | None, str | None]] = []
    with path.open("rb") as file:
        for line in file:
            done += len(line)
            if line.strip():
                rows.append(_object(line, columns))
            if len(rows) == _ROWS:
                yield rows, done / size
                rows = []
    if rows:
        yield rows, 1.0


def _object(line: bytes, columns: Columns) -> tuple[Any, Any, str | None, str | None]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as e:
        return None, None, None, f"the line is not JSON: {e}"
    if not isinstance(value, dict):
        return None, None, None, "the line is no JSON object"
    id, label = value.get(columns.id), value.get(columns.label)
    model = value.get(columns.model) if columns.model else None
    return id, label, model if model is None else str(model), None


def _rows(columns: Sequence[list[Any]]) -> list[tuple[Any, Any, str | None, str | None]]:
    ids, labels, *models = columns
    found = models[0] if models else [None] * len(ids)
    return [
        (None if id is None else str(id), label, model or None, None)
        for id, label, model in zip(ids, labels, found, strict=True)
    ]


def _value(text: str) -> Any:
    """A cell of a CSV file: a number, a list, or a class name; None where it is empty."""
    if is_number(text):
        number = float(text)
        return int(text) if text.lstrip("+-").isdigit() else _whole(number)
    if text.startswith("[") and text.endswith("]"):
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            return text
    return text or None


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number
