"""Qt's binary resource files (``.rcc``): the files inside one, by path.

Format as Qt's own reader has it (qresource.cpp): all numbers big-endian; a header with the places
of the tree, of the data and of the names; nodes of 14 bytes, 22 from version 2 on.
"""

from __future__ import annotations

import struct
import zlib

from posthoc.contract import HedgedError

_FOLDER, _ZLIB, _ZSTD = 2, 1, 4
_HEADER = struct.Struct(">4sIIII")


def read_rcc(data: bytes) -> dict[str, bytes]:
    """Path -> content of every file. Raises HedgedError for anything that is not such a file, and
    for one compressed with zstd."""
    try:
        magic, version, tree, contents, names = _HEADER.unpack_from(data)
        if magic != b"qres":
            raise HedgedError("not a Qt resource file: it does not begin with qres")
        found: dict[str, bytes] = {}
        _walk(data, (tree, contents, names, 14 if version < 2 else 22), 0, "", found)
    except (struct.error, zlib.error, UnicodeDecodeError, RecursionError) as e:
        raise HedgedError(f"a damaged Qt resource file: {e}") from e
    return found


def _walk(
    data: bytes, places: tuple[int, int, int, int], node: int, path: str, into: dict[str, bytes]
) -> None:
    tree, contents, names, size = places
    at = tree + node * size
    name_at, flags = struct.unpack_from(">IH", data, at)
    if node:  # the root has no name
        (length,) = struct.unpack_from(">H", data, names + name_at)
        start = names + name_at + 6  # behind the length and a hash
        name = data[start : start + 2 * length].decode("utf-16-be")
        path = f"{path}/{name}" if path else name
    if flags & _FOLDER:
        count, first = struct.unpack_from(">II", data, at + 6)
        for child in range(first, first + count):
            _walk(data, places, child, path, into)
        return
    if flags & _ZSTD:
        raise HedgedError(f"{path} is compressed with zstd, which is not read here")
    (content_at,) = struct.unpack_from(">I", data, at + 10)
    (length,) = struct.unpack_from(">I", data, contents + content_at)
    start = contents + content_at + 4
    content = data[start : start + length]
    into[path] = zlib.decompress(content[4:]) if flags & _ZLIB else content
