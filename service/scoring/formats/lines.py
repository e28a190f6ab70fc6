"""Text files as whole lines: opened, decompressed where they end in ``.gz``, cut into groups."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from service.scoring.places import Place

BLOCK_BYTES = 1 << 20
GROUP_ROWS = 8192
GROUP_BYTES = 16 << 20
MAX_LINE_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"


class Groups:
    """Blocks of lines joined to groups: the rows of each, and the byte offset where it begins."""

    def __init__(self, start: int):
        self.rows: list[int] = []
        self.starts: list[int] = []
        self._end = start

    def add(self, lines: Iterable[bytes]) -> int:
        """Add a block of lines, blank ones too; how many of them are rows."""
        rows = nbytes = 0
        for line in lines:
            nbytes += len(line) + 1
            rows += not blank(line)
        if not self.rows or (
            self.rows[-1] >= GROUP_ROWS or self._end - self.starts[-1] >= GROUP_BYTES
        ):
            self.rows.append(0)
            self.starts.append(self._end)
        self.rows[-1] += rows
        self._end += nbytes
        return rows

    def of(self, place: Place) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows and offsets of all groups: one in a compressed file, where no other can be found
        without reading all before it."""
        if not self.rows or not is_compressed(place):
            return tuple(self.rows), tuple(self.starts)
        return (sum(self.rows),), (self.starts[0],)


def is_compressed(place: Place) -> bool:
    """Whether a file is read through gzip."""
    return place.path.lower().endswith(".gz")


def blank(line: bytes) -> bool:
    """Whether a line holds nothing, and so is no row."""
    return not line or line == b"\r"


@contextmanager
def open_text(place: Place, start: int = 0) -> Iterator[IO[bytes]]:
    """The bytes of a UTF-8 file, uncompressed, from ``start`` on; 0 is behind its byte order mark.

    Raises OSError for a file of UTF-16.
    """
    with place.open() as stored:
        plain: Any = io.BufferedReader(stored)
        if is_compressed(place):
            plain = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(mode="rb", fileobj=plain)))
        head = plain.read(len(_BOM))
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in head:
            raise OSError(
                "its text is UTF-16, and UTF-8 is read; convert it: iconv -f UTF-16 -t UTF-8"
            )
        plain.seek(start or (len(_BOM) if head == _BOM else 0))
        yield plain


def read_lines(file: IO[bytes]) -> Iterator[list[bytes]]:
    """All lines in blocks, without their line feeds. Raises OSError for one beyond all measure."""
    rest = b""
    while block := file.read(BLOCK_BYTES):
        *whole, rest = (rest + block).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise OSError(f"a line has more than {MAX_LINE_BYTES:,} bytes")
        if whole:
            yield whole
    if rest:
        yield [rest]


def in_pieces(blocks: Iterator[list[bytes]], size: int, count: int) -> Iterator[list[bytes]]:
    """The first ``count`` lines that are not blank, ``size`` at a time; the last may be shorter."""
    held: list[bytes] = []
    left = count
    for block in blocks:
        held += (line for line in block if not blank(line))
        while len(held) >= min(size, left) > 0:
            take = min(size, left)
            yield held[:take]
            del held[:take]
            left -= take
        if not left:
            return
    if held:
        yield held
