"""CSV as RFC 4180 has it: commas, quotes, names in the first line, UTF-8; gzip too.

Columns of the model's inputs become numbers. All others are text, character for character; a field
that is empty, and not in quotes, is null. Blank lines are no rows. A quoted field may hold line
breaks, and at most 131,072 characters.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from posthoc.columns import Faults, merge
from service.scoring.formats.format import Format, Layout, Piece, Wanted, damage
from service.scoring.formats.lines import Groups, blank, in_pieces, open_text, read_lines
from service.scoring.formats.numbers import from_texts
from service.scoring.places import Place


def look(place: Place) -> Layout:
    """Names of the columns, and rows and offsets of the groups, from one pass over the file."""
    with damage(), open_text(place) as file:
        names, start = _header(file)
        file.seek(start)
        groups = Groups(start)
        for records in _records(read_lines(file)):
            groups.add(records)
        rows, starts = groups.of(place)
        return Layout(rows, pa.schema([(name, pa.string()) for name in names]), starts)


def read(place: Place, wanted: Wanted) -> Iterator[Piece]:
    """Rows a piece at a time."""
    with damage(), open_text(place) as file:
        names, start = _header(file)
        file.seek(wanted.start or start)
        at = [names.index(c) for c in wanted.columns]
        size = wanted.rows(None)
        for records in in_pieces(_records(read_lines(file)), size, wanted.count):
            texts, bad = _split(records, len(names), at)
            if _unclosed(records[-1]):
                bad[len(records) - 1] = "its last quote is never closed"
            arrays = []
            for name, column in zip(wanted.columns, texts, strict=True):
                if name in wanted.inputs:
                    column, faults = from_texts(column, wanted.inputs[name])
                    merge(bad, name, faults)
                arrays.append(column)
            yield Piece(pa.record_batch(arrays, names=list(wanted.columns)), bad)


def _header(file: IO[bytes]) -> tuple[list[str], int]:
    """Names of the columns, and the offset of the line behind them. Raises OSError for none."""
    offset = file.tell()
    for records in _records(read_lines(file)):
        for record in records:
            offset += len(record) + 1
            if blank(record):
                continue
            if b"\r" in record.rstrip(b"\r"):
                raise OSError("its lines end in carriage returns alone; convert them to \\n")
            if b"\x00" in record:
                raise OSError("its first line holds zero bytes: this is no text in UTF-8")
            try:
                return next(csv.reader([record.decode()])), offset
            except UnicodeDecodeError as e:
                raise OSError(f"its first line {_not_utf8(e)}") from e
    raise OSError("the file is empty: a first line with the names of the columns is needed")


def _records(blocks: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
    """Lines joined where a quoted field holds line breaks."""
    for lines in blocks:
        yield lines if b'"' not in b"".join(lines) else _quoted(lines, blocks)


def _quoted(lines: list[bytes], blocks: Iterator[list[bytes]]) -> list[bytes]:
    """The records of a block, and of those after it into which the last one reaches."""
    at = begin = 0

    def pull() -> Iterator[str]:
        nonlocal at, lines
        while True:
            if at == len(lines):
                more = next(blocks, None)
                if more is None:
                    return
                lines = lines + more
            at += 1
            yield lines[at - 1].decode("latin-1") + "\n"

    found: list[bytes] = []
    reader = csv.reader(pull())
    while begin < len(lines):
        try:
            next(reader)
        except csv.Error as e:
            if "field limit" in str(e):
                raise OSError(
                    f"a quote is not closed within {csv.field_size_limit():,} characters, row "
                    f"{len(found)} of this part"
                ) from e
            reader = csv.reader(pull())  # a carriage return within a line: its row is bad
        found.append(b"\n".join(lines[begin:at]))
        begin = at
    return found


def _split(
    records: Sequence[bytes], width: int, columns: Sequence[int]
) -> tuple[list[pa.Array], Faults]:
    """Those columns of the records as text, and what is wrong with single records."""
    data = b"\n".join(records)
    # Arrow takes a carriage return outside quotes for a line's end: one record at a time, its
    # number of rows says so.
    returns = data.count(b"\r") - data.endswith(b"\r") if b"\r" in data else 0
    sure = len(records) == 1 or not returns or returns == data.count(b"\r\n")
    faults: Faults = {}

    def refuse(row: Any) -> str:
        # The first line is the header, and lines count from 1.
        faults[row.number - 2] = f"has {row.actual_columns} fields, and the first line {width}"
        return "skip"

    if sure:
        names = [str(i) for i in range(width)]
        text = ",".join(names).encode() + b"\n" + data + b"\n"
        wanted = list(dict.fromkeys(str(i) for i in columns))
        try:
            table = pacsv.read_csv(
                pa.BufferReader(text),
                pacsv.ReadOptions(use_threads=False, block_size=len(text) + 1),
                pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse),
                pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    include_columns=wanted or names[:1],
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                    null_values=[""],
                ),
            ).combine_chunks()
        except pa.ArrowInvalid:
            table = None
        if table is not None and len(table) + len(faults) == len(records):
            return [_spread(table[str(i)], faults, len(records)) for i in columns], faults
    if len(records) == 1:
        return [pa.nulls(1, pa.string()) for _ in columns], {0: _fault(records[0])}
    half = len(records) // 2
    first, bad = _split(records[:half], width, columns)
    second, others = _split(records[half:], width, columns)
    bad.update({half + r: why for r, why in others.items()})
    return [pa.concat_arrays(pair) for pair in zip(first, second, strict=True)], bad


def _spread(column: pa.ChunkedArray, missing: Faults, rows: int) -> pa.Array:
    """A column with nulls put in at the rows that are missing."""
    whole = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if not missing:
        return whole
    there = np.ones(rows, bool)
    there[list(missing)] = False
    at = np.cumsum(there) - 1
    return whole.take(pa.array(np.where(there, at, 0), mask=~there))


def _fault(record: bytes) -> str:
    try:
        record.decode()
    except UnicodeDecodeError as e:
        return _not_utf8(e)
    return "cannot be split into fields: look at its quotes and carriage returns"


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"is no text in UTF-8 (byte {byte:#04x} at {error.start}); convert the file to UTF-8"


def _unclosed(record: bytes) -> bool:
    """Whether a record, the last of its file, ends inside a quoted field."""
    if b'"' not in record:
        return False
    asked = False

    def pull() -> Iterator[str]:
        nonlocal asked
        yield from (line + "\n" for line in record.decode("latin-1").split("\n"))
        asked = True

    with suppress(csv.Error):
        next(csv.reader(pull()))
    return asked


CSV = Format("CSV", (".csv", ".csv.gz"), look, read)
