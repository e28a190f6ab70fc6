"""Labels as columns: Parquet and Arrow IPC streams with ``id``, ``label`` and maybe ``model``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from posthoc.columns import is_list, is_text
from posthoc.contract import DataError
from service import ipc
from service.errors import ServiceError, invalid, shorten
from service.feedback import check_count
from service.media import PARQUET
from service.parquet import check_pages, check_size

KEYS = ("id", "label", "model")
_FILE = "Parquet file that can be read"
_THRIFT = 1 << 20  # of a Parquet footer: characters of a text, elements of a list


def parse_table(
    body: bytes, media_type: str, limit: int, max_bytes: int
) -> Iterator[dict[str, Any]]:
    """One object ``{"id", "label", "model"}`` for each row, as JSON would have it.

    Whole numbers may be ids; a label column holds class names, class indices, numbers (a whole
    one may be an index), or lists of numbers. Raises ServiceError 400 for other columns or types
    and for bytes that are no such table, 413 for more than ``limit`` rows or for what unpacks to
    more than ``max_bytes``.
    """
    if media_type == PARQUET:
        schema, batches = _parquet(body, limit, max_bytes)
    else:
        schema = ipc.read_schema(body, len(KEYS))
        batches = ipc.read_batches(body, [*range(len(schema))])
    names = schema.names
    for name in names:
        if name not in KEYS or names.count(name) > 1:
            raise invalid(f"column {shorten(name)!r}: the columns are {', '.join(KEYS)}, each once")
    for name in KEYS[:2]:
        if name not in names:
            raise invalid(f"there is no column {name!r}")
    for name in names:
        if fault := fault_of(name, schema.field(name).type):
            raise invalid(fault)
    return _objects(batches, limit, max_bytes)


def fault_of(role: str, kind: pa.DataType) -> str | None:
    """What is wrong with a column of this type as ``id``, ``label`` or ``model``."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    text, whole = is_text(plain), pa.types.is_integer(plain)
    if role == "label":
        if is_list(plain):
            plain = plain.value_type
        text = text and not is_list(kind)
        good = text or pa.types.is_integer(plain) or pa.types.is_floating(plain)
        wanted = "class names, numbers or lists of numbers"
    else:
        good, wanted = text or (whole and role == "id"), "texts"
    return None if good else f"column of {role}s holds {shorten(str(kind))}; {wanted} are needed"


def cells(column: pa.Array, most: int) -> list[Any]:
    """Python values of a column that `fault_of` found nothing in; whole floats become integers.

    Raises DataError where texts take more than ``most`` characters: many rows may share one.
    """
    if pa.types.is_dictionary(column.type):
        named = cells(column.dictionary, most)
        values = [None if at is None else named[at] for at in column.indices.to_pylist()]
    else:
        values = column.to_pylist()
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if is_text(kind) and sum(len(v) for v in values if v is not None) > most:
        raise DataError(f"the texts of a column take more than {most} characters")
    if pa.types.is_floating(kind):
        return [int(v) if v is not None and v.is_integer() else v for v in values]
    return values


def _objects(
    batches: Iterable[pa.RecordBatch], limit: int, max_bytes: int
) -> Iterator[dict[str, Any]]:
    rows = texts = 0
    for batch in batches:
        rows += batch.num_rows
        check_count(rows, limit)
        try:
            columns = [cells(column, max_bytes) for column in batch.columns]
        except DataError as e:
            raise _too_large(str(e)) from None
        texts += sum(len(v) for column in columns for v in column if isinstance(v, str))
        check_size(texts, max_bytes)
        names = batch.schema.names
        ids = names.index("id")
        columns[ids] = [v if v is None else str(v) for v in columns[ids]]
        for values in zip(*columns, strict=True):
            yield {k: v for k, v in zip(names, values, strict=True) if k == "id" or v is not None}


def _parquet(body: bytes, limit: int, max_bytes: int) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    bounds = {"thrift_string_size_limit": _THRIFT, "thrift_container_size_limit": _THRIFT}
    with ipc.refusing(_FILE):
        with pq.ParquetFile(pa.BufferReader(body), **bounds) as file:
            found = file.metadata
        check_count(found.num_rows, limit)
        every = range(found.num_columns)
        reading = check_pages(body, found, max_bytes)
        # Texts stay encoded, so that many rows with one long text stay small.
        plain = [path for path in (found.schema.column(c).path for c in every) if path in KEYS]
        file = pq.ParquetFile(
            pa.BufferReader(body),
            metadata=found,
            read_dictionary=plain if reading.encoded else None,
            **bounds,
        )
        return file.schema_arrow, _batches(file, reading.rows)


def _batches(file: pq.ParquetFile, rows: int) -> Iterator[pa.RecordBatch]:
    with ipc.refusing(_FILE):
        for batch in file.iter_batches(rows, use_threads=False):
            batch.validate(full=True)
            yield batch


def _too_large(message: str) -> ServiceError:
    return ServiceError(413, "too_many_values", f"{message}; send fewer labels")
