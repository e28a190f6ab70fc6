"""NumPy's ``.npy`` files and members of ``.npz``: rows of an array, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import numpy as np
import pyarrow as pa

from posthoc.contract import Array, DataError


@dataclass(frozen=True, slots=True)
class Header:
    """What the head of a ``.npy`` says: N×… values of ``dtype``; in ``fortran`` order the rows are
    not contiguous, and only the whole array can be read."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool

    @property
    def rows(self) -> int:
        """Rows of the array."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return prod(self.shape[1:]) * self.dtype.itemsize


def read_header(file: IO[bytes], name: str) -> Header:
    """The head of array ``name``; ``file`` then stands at its first value. Nothing is unpickled.

    Raises DataError for values that are neither numbers, dates nor text and for rows without
    values, ValueError for a damaged head.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject or dtype.kind not in "biufUSM":
        raise DataError(f"array {name!r} holds {dtype}, not numbers or text")
    if not shape or 0 in shape[1:]:
        raise DataError(f"array {name!r} of shape {shape} has no values in a row")
    return Header(dtype, shape, fortran and len(shape) > 1)


def read_rows(
    file: IO[bytes], header: Header, size: int, start: int = 0, stop: int | None = None
) -> Iterator[Array]:
    """Rows ``start``, … before ``stop`` in blocks of ``size``, from a file that stands at the first
    value. Raises ValueError for a file that ends early."""
    stop = header.rows if stop is None else stop
    if header.fortran:
        flat = np.frombuffer(file.read(), header.dtype)
        whole = flat.reshape(header.shape, order="F")
        for at in range(start, stop, size):
            yield whole[at : min(at + size, stop)]
        return
    file.seek(start * header.row_bytes, 1)
    for at in range(start, stop, size):
        rows = min(size, stop - at)
        block = file.read(rows * header.row_bytes)
        yield np.frombuffer(block, header.dtype).reshape(rows, *header.shape[1:])


def to_arrow(array: Array) -> pa.Array:
    """An array N×… as an Arrow column: scalars, or fixed-shape tensors."""
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    if array.ndim == 1:
        return pa.array(array)
    values = pa.array(array.ravel())
    rows = pa.FixedSizeListArray.from_arrays(values, prod(array.shape[1:]))
    kind = pa.fixed_shape_tensor(values.type, array.shape[1:])
    return pa.ExtensionArray.from_storage(kind, rows)
