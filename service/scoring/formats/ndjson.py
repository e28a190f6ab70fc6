"""NDJSON: a JSON object on each line, UTF-8; gzip too.

The columns are the keys of the first group of lines. Those of the model's inputs become numbers, or
lists of them; all others are text: strings as they are, anything else as JSON writes it. A key that
an object lacks is null. Blank lines are no rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow as pa

from posthoc.columns import Faults, merge
from service.scoring.formats.format import Format, Layout, Piece, Wanted, damage
from service.scoring.formats.lines import Groups, blank, in_pieces, open_text, read_lines
from service.scoring.formats.numbers import from_values
from service.scoring.places import Place


def look(place: Place) -> Layout:
    """Columns, and rows and offsets of the groups, from one pass over the file."""
    keys: dict[str, None] = {}
    objects = False
    with damage(), open_text(place) as file:
        groups = Groups(file.tell())
        for lines in read_lines(file):
            groups.add(lines)
            if len(groups.rows) == 1:
                for line in lines:
                    if not blank(line) and not isinstance(found := _object(line), str):
                        keys.update(dict.fromkeys(found))
                        objects = True
    rows, starts = groups.of(place)
    if not objects:
        raise OSError(
            f"none of its first {sum(groups.rows[:1]):,} lines is a JSON object; one object on "
            "each line is read"
        )
    return Layout(rows, pa.schema([(key, pa.string()) for key in keys]), starts)


def read(place: Place, wanted: Wanted) -> Iterator[Piece]:
    """Rows a piece at a time."""
    with damage(), open_text(place, wanted.start) as file:
        size = wanted.rows(None)
        for lines in in_pieces(read_lines(file), size, wanted.count):
            bad: Faults = {}
            rows: list[dict[str, Any]] = []
            for at, line in enumerate(lines):
                found = _object(line)
                if isinstance(found, str):
                    bad[at], found = found, {}
                rows.append(found)
            arrays = []
            for name in wanted.columns:
                values = [row.get(name) for row in rows]
                if name in wanted.inputs:
                    column, faults = from_values(values, wanted.inputs[name])
                    merge(bad, name, faults)
                else:
                    column = pa.array([_text(v) for v in values], pa.string())
                arrays.append(column)
            yield Piece(pa.record_batch(arrays, names=list(wanted.columns)), bad)


def _object(line: bytes) -> dict[str, Any] | str:
    """The object on a line, or what is wrong with it."""
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as e:
        return f"is no JSON ({str(e).split(': line')[0]})"
    return found if isinstance(found, dict) else "is no JSON object"


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return orjson.dumps(value).decode()


NDJSON = Format("NDJSON", (".ndjson", ".jsonl", ".ndjson.gz", ".jsonl.gz"), look, read)
