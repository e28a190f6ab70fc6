"""NumPy's files: ``.npy`` is the model's only input, an ``.npz`` holds arrays by the names of the
bundle's columns, or of the model's inputs. Nothing is unpickled.

Rows of a ``.npy`` are found by their offset, and large files are cut into fragments; an ``.npz`` is
one fragment, and so is an array in Fortran's order, which is read whole.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, cast

import numpy as np
import pyarrow as pa

from posthoc.arrays import Header, read_header, read_rows, to_arrow
from posthoc.contract import DataError, TensorSpec
from service.scoring.formats.format import Filling, Format, Layout, Piece, Wanted, damage
from service.scoring.places import Place

ARRAY = "array"  # the one column of a .npy
GROUP_ROWS = 8192
GROUP_BYTES = 16 << 20


def look_npy(place: Place) -> Layout:
    """Rows of each group from the head alone."""
    with damage(), _opened(place) as file:
        header = read_header(file, place.path.rsplit("/", 1)[-1])
        size = file.seek(0, io.SEEK_END) - _start(file, header)
        if size != header.rows * header.row_bytes:
            raise OSError(f"it holds {size:,} bytes of {header.rows * header.row_bytes:,}")
        return Layout(_groups(header), pa.schema([(ARRAY, pa.null())]))


def read_npy(place: Place, wanted: Wanted) -> Iterator[Piece]:
    """Rows a piece at a time."""
    with damage(), _opened(place) as file:
        header = read_header(file, ARRAY)
        first = sum(_groups(header)[: wanted.groups[0]]) if wanted.groups else 0
        size = wanted.rows(header.row_bytes / header.dtype.itemsize)
        for block in read_rows(file, header, size, first, first + wanted.count):
            yield Piece(pa.record_batch([to_arrow(block)], names=[ARRAY]))


def look_npz(place: Place) -> Layout:
    """Rows and the names of the arrays."""
    with damage(), _archive(place) as archive:
        headers = {}
        for member in archive.namelist():
            if not member.endswith(".npy"):
                raise DataError(f"{member!r} is not an array")
            name = member.removesuffix(".npy")
            if name in headers:
                raise DataError(f"two arrays are called {name!r}")
            with archive.open(member) as file:
                headers[name] = read_header(file, name)
        lengths = {name: header.rows for name, header in headers.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"arrays must have one length; they have {lengths}")
        types = [(name, _type(header)) for name, header in headers.items()]
        return Layout((next(iter(lengths.values())),), pa.schema(types))


def read_npz(place: Place, wanted: Wanted) -> Iterator[Piece]:
    """Rows a piece at a time."""
    with damage(), ExitStack() as stack:
        archive = stack.enter_context(_archive(place))
        files = [stack.enter_context(archive.open(f"{c}.npy")) for c in wanted.columns]
        headers = [read_header(f, c) for f, c in zip(files, wanted.columns, strict=True)]
        values = sum(
            h.row_bytes / h.dtype.itemsize
            for h, c in zip(headers, wanted.columns, strict=True)
            if c in wanted.inputs
        )
        size = wanted.rows(values)
        readers = [read_rows(f, h, size) for f, h in zip(files, headers, strict=True)]
        for blocks in zip(*readers, strict=True):
            arrays = [to_arrow(b) for b in blocks]
            yield Piece(pa.record_batch(arrays, names=list(wanted.columns)))


def only_input(filling: Filling, specs: Sequence[TensorSpec], schema: pa.Schema) -> Filling:
    """The array fills the model's only input. Raises DataError for a model of several."""
    if len(specs) != 1:
        names = ", ".join(s.name for s in specs)
        raise DataError(
            f"a .npy file fills the one input of a model, and this one takes {names}; give an "
            ".npz with an array of each name"
        )
    return {specs[0].name: (ARRAY,)}


def by_name(filling: Filling, specs: Sequence[TensorSpec], schema: pa.Schema) -> Filling:
    """Each input's columns, or the array of its own name where one of those is missing."""
    have = set(schema.names)
    return {
        name: (name,) if name in have and not set(columns) <= have else columns
        for name, columns in filling.items()
    }


def _groups(header: Header) -> tuple[int, ...]:
    if header.fortran or not header.rows:
        return (header.rows,)
    size = max(1, min(GROUP_ROWS, GROUP_BYTES // max(1, header.row_bytes)))
    whole, rest = divmod(header.rows, size)
    return (size,) * whole + ((rest,) if rest else ())


def _start(file: IO[bytes], header: Header) -> int:
    """The offset of the first value. A head ends where the values begin, and was just read."""
    file.seek(0)
    read_header(file, ARRAY)
    return file.tell()


def _type(header: Header) -> pa.DataType:
    """The type of an array's column: that of no rows."""
    return to_arrow(np.empty((0, *header.shape[1:]), header.dtype)).type


@contextmanager
def _opened(place: Place) -> Iterator[IO[bytes]]:
    with place.open() as stored:
        yield cast(IO[bytes], io.BufferedReader(stored))


@contextmanager
def _archive(place: Place) -> Iterator[zipfile.ZipFile]:
    with _opened(place) as file, zipfile.ZipFile(file) as archive:
        yield archive


NPY = Format("NumPy .npy", (".npy",), look_npy, read_npy, only_input)
NPZ = Format("NumPy .npz", (".npz",), look_npz, read_npz, by_name)
