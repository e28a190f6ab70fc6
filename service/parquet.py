"""Parquet from strangers: what its pages will take is known before any of them is decoded.

Arrow allocates for a page what the page's own header says, up to 2 GB, whatever the footer says of
the whole, and has no bound that could be set. So the headers are read first, here: they lie between
the pages, and each says where the next one begins. Where texts share what they begin with
(DELTA_BYTE_ARRAY) no header says how large they are; of such few rows are decoded at a time.
Source of the layout: parquet-format, parquet.thrift; Apache Thrift, thrift-compact-protocol.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from service.errors import ServiceError, invalid

_ROWS = 10_000  # decoded at a time, at most
_PAGES = 16_384  # in one file
_NUMBER = 16  # bytes that a value takes in memory beside its text
_SLACK = 100  # bytes behind a column that Arrow reads of files by an old parquet-mr
_DEPTH = 8  # structs within structs in a header
_DICTIONARY = 2  # a type of page
_DATA = {0: 5, 3: 8}  # the others: field of the header that says more
_ENCODING = {5: 2, 8: 4}  # in which field
_LENGTHS, _SHARED = 6, 7  # DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY

Struct = dict[int, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """What a page's header says: bytes when unpacked, values and, but of a dictionary, how they are
    encoded."""

    size: int
    values: int
    dictionary: bool
    encoding: int | None


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file may be decoded: rows at a time, and whether texts may stay a dictionary."""

    rows: int
    encoded: bool


def check_pages(body: bytes, found: pq.FileMetaData, max_bytes: int) -> Reading:
    """Read the header of each page that Arrow would decode.

    Raises ServiceError 413 where the pages or their values take more than ``max_bytes`` in all, and
    400 for more than `_PAGES` of them and for columns that are not what the footer says.
    """
    if found.num_row_groups * found.num_columns > _PAGES:
        raise _too_many()
    count = unpacked = 0
    longest, encoded = 1, True
    for group in range(found.num_row_groups):
        for column in range(found.num_columns):
            for page in _pages(body, found.row_group(group).column(column)):
                count += 1
                if count > _PAGES:
                    raise _too_many()
                unpacked += max(page.size, (_NUMBER if page.dictionary else 8) * page.values)
                check_size(unpacked, max_bytes)
                if page.dictionary or page.encoding == _SHARED:  # a text may stand for many
                    longest = max(longest, page.size)
                # Of these Arrow makes no dictionary.
                encoded &= page.encoding not in (_LENGTHS, _SHARED)
    return Reading(_ROWS if encoded else max(1, min(_ROWS, max_bytes // longest)), encoded)


def check_size(unpacked: int, max_bytes: int) -> None:
    """Raise ServiceError 413 for labels that take more than ``max_bytes``."""
    if unpacked > max_bytes:
        raise ServiceError(
            413,
            "too_many_values",
            f"the labels unpack to {unpacked} bytes and {max_bytes} are the most; "
            "send fewer labels",
        )


def _pages(body: bytes, chunk: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """The pages of one column of a row group, as Arrow goes through them: until it has all values
    that the footer says there are."""
    at = max(chunk.data_page_offset, 0)
    first = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    if first is not None and 0 < first < at:
        at = first
    end = min(at + chunk.total_compressed_size + _SLACK, len(body))
    seen = 0
    while seen < chunk.num_values:
        try:
            header, at = _struct(body, at, end, 0)
            kind, size, stored = header[1], header[2], header[3]
            more = header[_DATA[kind]] if kind in _DATA else header.get(7, {})
            values = more[1] if kind in _DATA or kind == _DICTIONARY else 0
            encoding = more[_ENCODING[_DATA[kind]]] if kind in _DATA else None
            if min(size, stored, values) < 0 or stored > end - at:
                raise _broken("a page is not within its column")
        except (LookupError, TypeError):
            raise _broken("the header of a page cannot be read") from None
        at += stored
        seen += values if kind in _DATA else 0
        yield Page(size, values, kind == _DICTIONARY, encoding)


def _struct(data: bytes, at: int, end: int, depth: int) -> tuple[Struct, int]:
    """A Thrift struct in the compact protocol, its numbers and structs by field, and where it ends.

    Raises LookupError for bytes that are none.
    """
    if depth > _DEPTH:
        raise LookupError("too deep")
    found: Struct = {}
    field = 0
    while True:
        byte, at = _byte(data, at, end)
        kind = byte & 0xF
        if kind == 0:
            return found, at
        if byte >> 4:
            field += byte >> 4
        else:
            field, at = _number(data, at, end)
        found[field], at = _value(data, at, end, kind, depth)


def _value(data: bytes, at: int, end: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, at
    if kind == 3:
        return _byte(data, at, end)
    if kind in (4, 5, 6):
        return _number(data, at, end)
    if kind == 7:
        return None, at + 8
    if kind == 8:  # a minimum or maximum
        size, at = _varint(data, at, end)
        return None, at + size
    if kind == 12:
        return _struct(data, at, end, depth + 1)
    raise LookupError("no such field in a page's header")  # lists and maps


def _byte(data: bytes, at: int, end: int) -> tuple[int, int]:
    if at >= end:
        raise LookupError("cut short")
    return data[at], at + 1


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte, at = _byte(data, at, end)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise LookupError("a number without end")


def _number(data: bytes, at: int, end: int) -> tuple[int, int]:
    value, at = _varint(data, at, end)
    return (value >> 1) ^ -(value & 1), at


def _too_many() -> ServiceError:
    return invalid(f"the Parquet file has more than {_PAGES} pages; write larger ones")


def _broken(what: str) -> ServiceError:
    return invalid(f"the body is no Parquet file that can be read: {what}")
