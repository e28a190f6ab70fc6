"""Arrow IPC: files (Feather 2 too), of which a group is a record batch, and streams, which are one
group. Either is known by its first bytes, since both are called ``.arrow``.

A record batch is read whole: of a file of this machine as it lies on the disk (do not cut it short
meanwhile), from an object store into memory. The format has no checksums, and a stream need not say
that it has ended: one that was cut off between two batches looks whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.ipc as ipc

from service.scoring.formats.format import Format, Layout, Piece, Wanted
from service.scoring.places import Place

_MAGIC = b"ARROW1"


def look(place: Place) -> Layout:
    """Record batches and schema. Of a file only the smallest column is read, of a stream all."""
    with _opened(place) as file:
        if not _is_file(file):
            with ipc.open_stream(file) as stream:
                rows = sum(batch.num_rows for batch in stream)
                return Layout((rows,), stream.schema)
        with ipc.open_file(file) as reader:
            schema = reader.schema
            count = reader.num_record_batches
        columns = [_smallest(schema)] if len(schema) else None
        options = ipc.IpcReadOptions(included_fields=columns, use_threads=False)
        with ipc.open_file(file, options=options) as reader:
            groups = tuple(reader.get_batch(i).num_rows for i in range(count))
        return Layout(groups, schema)


def read(place: Place, wanted: Wanted) -> Iterator[Piece]:
    """Rows a piece at a time."""
    size = wanted.rows(None)
    with _opened(place) as file:
        for batch in _batches(file, wanted.groups, wanted.columns):
            for column in batch.columns:
                column.validate(full=True)  # else damaged offsets end the process
            for at in range(0, batch.num_rows, size):
                yield Piece(batch.slice(at, size))


def _batches(
    file: pa.NativeFile, groups: Sequence[int], columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    if not _is_file(file):
        with ipc.open_stream(file) as stream:
            for batch in stream:
                yield batch.select(list(columns))
        return
    with ipc.open_file(file) as reader:
        schema = reader.schema
    fields = [schema.get_field_index(c) for c in columns]
    options = ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    with ipc.open_file(file, options=options) as reader:
        for group in groups:
            yield reader.get_batch(group).select(list(columns))


@contextmanager
def _opened(place: Place) -> Iterator[pa.NativeFile]:
    with place.open() if place.local is None else pa.memory_map(str(place.local)) as file:
        yield file


def _is_file(file: pa.NativeFile) -> bool:
    head = file.read(len(_MAGIC))
    file.seek(0)
    return bool(head == _MAGIC)


def _smallest(schema: pa.Schema) -> int:
    """A column whose values take few bytes each."""

    def bits(index: int) -> int:
        try:
            return int(schema.field(index).type.bit_width)
        except ValueError:  # values of any length
            return 1 << 20

    return min(range(len(schema)), key=bits)


IPC = Format("Arrow IPC", (".arrow", ".arrows", ".feather", ".ipc"), look, read)
