"""Arrow IPC streams from strangers: bounded and plain before any of them is decoded.

Arrow decodes what a stream says. So what makes little into much is refused first, by the messages'
own headers: compressed buffers, dictionaries that grow, schemas of a million fields.
Source of the layout: Arrow, format/Message.fbs and format/Schema.fbs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from service.errors import invalid, shorten

_STREAM = "Arrow IPC stream"
_CONTINUES = 0xFFFFFFFF
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # what a message holds, and the fields of each, by number
_ENDIANNESS, _DATA, _DELTA, _COMPRESSION = 0, 1, 2, 3
_MESSAGES = 16_384  # in one stream
_METADATA = 64 << 10  # bytes of one message's header, and more for each column
_PER_COLUMN = 1 << 10


def read_schema(body: bytes, columns: int) -> pa.Schema:
    """The schema of a stream that may be decoded: its messages were looked through.

    ``columns`` is how many a request may usefully have. Raises ServiceError 400 for bytes that are
    no such stream, for compressed buffers, delta dictionaries, big-endian numbers, and headers too
    large for the columns.
    """
    with refusing(_STREAM):
        _check(body, _METADATA + _PER_COLUMN * columns)
        with pa.ipc.open_stream(body) as reader:
            schema = reader.schema
        _ = schema.names  # decoded here, where names that are no text are refused
        return schema


def read_batches(body: bytes, columns: list[int]) -> Iterator[pa.RecordBatch]:
    """The record batches of a stream that `read_schema` let pass, each of them wholly validated.

    ``columns`` are the indices of those that are decoded, at least one. Raises ServiceError 400.
    """
    options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=columns)
    with refusing(_STREAM), pa.ipc.open_stream(body, options=options) as reader:
        for batch in reader:
            batch.validate(full=True)
            yield batch


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Around the decoding of a body: whatever it raises says that the body is no ``what``."""
    try:
        yield
    # Names that are not UTF-8, sizes that do not fit: Arrow's own exceptions are not all it raises.
    except (pa.ArrowException, OSError, ValueError, LookupError, struct.error) as e:
        raise invalid(f"the body is no {what}: {shorten(str(e), 200)}") from None


def _check(body: bytes, most: int) -> None:
    """Walk the messages of a stream, none of whose headers may take more than ``most`` bytes."""
    source = pa.BufferReader(body)
    reader = pa.ipc.MessageReader.open_stream(source)
    for _ in range(_MESSAGES):
        at = source.tell()
        if 0 < at == len(body):  # a stream may end without saying so
            return
        mark, size = struct.unpack_from("<Ii", body, at)
        if mark != _CONTINUES:
            raise invalid(f"the body is no {_STREAM} (the file format is another one)")
        if size == 0:
            if at + 8 != len(body):
                raise invalid(f"{len(body) - at - 8} bytes follow the end of the Arrow stream")
            return
        if size > most:
            raise invalid(f"a header of {size} bytes is in the Arrow stream; {most} are the most")
        # Reading a message verifies its header, which makes it safe to look into.
        _check_message(reader.read_next_message().metadata.to_pybytes())
    raise invalid(f"the Arrow stream has more than {_MESSAGES} messages; send larger batches")


def _check_message(header: bytes) -> None:
    root = int(struct.unpack_from("<I", header)[0])
    (kind,) = _field(header, root, 1, "<B")
    held = _table(header, root, 2)
    if kind == _SCHEMA:
        if _field(header, held, _ENDIANNESS, "<h") != (0,):
            raise invalid("the Arrow stream is big-endian; send little-endian numbers")
        return
    if kind == _DICTIONARY:
        if _field(header, held, _DELTA, "<B") != (0,):
            raise invalid("the Arrow stream has a delta dictionary; send whole dictionaries")
        held = _table(header, held, _DATA)
    elif kind != _BATCH:
        raise invalid("the Arrow stream holds something that is no record batch")
    if _offset(header, held, _COMPRESSION):
        raise invalid("the Arrow stream is compressed; write it with compression=None")


def _field(header: bytes, table: int, number: int, format: str) -> tuple[int, ...]:
    """A number in a table of a flatbuffer; 0 where it is left out."""
    at = _offset(header, table, number)
    return struct.unpack_from(format, header, table + at) if at else (0,)


def _table(header: bytes, table: int, number: int) -> int:
    """Where the table lies that a field of another one points to."""
    at = table + _offset(header, table, number)
    return at + int(struct.unpack_from("<I", header, at)[0])


def _offset(header: bytes, table: int, number: int) -> int:
    """Where a field lies in its table; 0 where it is left out."""
    fields = table - int(struct.unpack_from("<i", header, table)[0])
    (size,) = struct.unpack_from("<H", header, fields)
    at = 4 + 2 * number
    return int(struct.unpack_from("<H", header, fields + at)[0]) if at + 2 <= size else 0
