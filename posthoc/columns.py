"""One Arrow column → a dense array of one dtype, with the faults of single rows told apart.

A fault of a row (null, wrong length, not finite, not castable) is reported for that row, which
then holds zeros, so that one bad row never fails its neighbours. A fault of the column (its type)
is a DataError.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from posthoc.contract import Array, DataError

Faults = dict[int, str]  # row -> what is wrong with it


def dense(
    column: Any, name: str, dtype: str, shape: tuple[int, ...], *, holes: bool = False
) -> tuple[Array, Faults]:
    """Column → array of (rows, *shape) and the faults of its rows.

    ``shape`` may hold -1, which takes the size that the column's type fixes or else that of its
    first usable row. A flat list fills any shape of its size; a nested list or tensor must have
    the shape itself, axes of one apart. With ``holes`` a NaN is a value, and no fault. Raises
    DataError when the column's type cannot.
    """
    column = decoded(column)
    kind = column.type
    tensor = isinstance(kind, pa.FixedShapeTensorType)
    leaf, fixed = _nesting(kind.storage_type if tensor else kind)
    wanted = f"{dtype} of shape {_text(shape)}" if shape else f"one {dtype} a row"
    if not (pa.types.is_integer(leaf) or pa.types.is_floating(leaf) or pa.types.is_boolean(leaf)):
        raise DataError(f"column {name!r}: expected {wanted}, found {kind}")
    order = tuple(kind.permutation or range(len(kind.shape))) if tensor else ()
    dims = tuple(kind.shape[p] for p in order) if tensor else _dims(column, fixed, shape)
    if not _fits(dims, shape):
        found = f"{kind} of shape {_text(dims)}" if dims else str(kind)
        raise DataError(f"column {name!r}: expected {wanted}, found {found}")
    if tensor:
        values, faults = _unnest(column.storage, (prod(dims),), np.dtype(dtype), holes)
        values = values.reshape(-1, *kind.shape).transpose(0, *(p + 1 for p in order))
    else:
        values, faults = _unnest(column, dims, np.dtype(dtype), holes)
    if faults:
        values[list(faults)] = 0
    return values.reshape(len(column), *_resolve(dims, shape)), faults


def decoded(column: Any) -> Any:
    """A column without dictionary encoding, and decimals as float64."""
    if isinstance(column.type, pa.DictionaryType):
        return column.dictionary_decode()
    return pc.cast(column, pa.float64()) if pa.types.is_decimal(column.type) else column


def _nesting(kind: Any) -> tuple[Any, tuple[int, ...]]:
    """The type at the bottom of nested lists, and the size of each level or -1."""
    sizes = []
    while (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        sizes.append(kind.list_size if pa.types.is_fixed_size_list(kind) else -1)
        kind = kind.value_type
    return kind, tuple(sizes)


def _dims(column: Any, fixed: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Size of each list level: from the type, else from ``shape``, else from the first row."""
    known = list(fixed)
    squeezed = tuple(s for s in shape if s != 1)
    if len(fixed) == 1 and -1 not in shape:
        like: tuple[int, ...] = (prod(shape),)
    else:
        like = shape if len(fixed) == len(shape) else squeezed
    if len(like) == len(fixed):
        known = [s if k == -1 else k for k, s in zip(known, like, strict=True)]
    if -1 not in known:
        return tuple(known)
    for row in column:
        sizes = _sizes(row.as_py(), len(fixed))
        if sizes is not None:
            return tuple(s if k == -1 else k for k, s in zip(known, sizes, strict=True))
    # No row to learn from: every row is at fault, whatever size is taken.
    return tuple(1 if k == -1 else k for k in known)


def _sizes(value: Any, depth: int) -> list[int] | None:
    """Lengths along the first elements of a nested list; None where it stops early."""
    sizes = []
    for _ in range(depth):
        if not value:
            return None
        sizes.append(len(value))
        value = value[0]
    return sizes


def _fits(dims: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether rows of ``dims`` may be read as rows of ``shape``."""
    if len(dims) == 0:
        return all(s in (1, -1) for s in shape)
    if len(dims) == 1:
        free = shape.count(-1)
        known = prod(s for s in shape if s != -1)
        return free <= 1 and (dims[0] % known == 0 if free else dims[0] == known)
    if len(dims) == len(shape):
        return all(s in (d, -1) for d, s in zip(dims, shape, strict=True))
    a, b = [d for d in dims if d != 1], [s for s in shape if s != 1]
    return len(a) == len(b) and all(s in (d, -1) for d, s in zip(a, b, strict=True))


def _resolve(dims: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` without -1, for rows of ``dims``."""
    if shape.count(-1) > 1:
        if len(dims) == len(shape):
            return dims
        rest = iter(d for d in dims if d != 1)
        return tuple(1 if s == 1 else next(rest, 1) for s in shape)
    known = prod(s for s in shape if s != -1)
    return tuple(prod(dims) // known if s == -1 else s for s in shape)


def _unnest(
    column: Any, dims: tuple[int, ...], dtype: np.dtype[Any], holes: bool
) -> tuple[Array, Faults]:
    """Nested lists → array of (rows, *dims); rows of another length or with nulls are faults."""
    if not dims:
        return _leaf(column, dtype, holes)
    size = dims[0]
    faults: Faults = {}
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    usable = lengths == size
    for row in np.flatnonzero(~usable):
        length = int(lengths[row])
        faults[int(row)] = (
            "is null" if length < 0 else f"has {length} values in a list, expected {size}"
        )
    whole = column if usable.all() else column.filter(pa.array(usable))
    inner, inner_faults = _unnest(whole.flatten(), dims[1:], dtype, holes)
    values = np.zeros((len(column), *dims), dtype)
    values[usable] = inner.reshape(-1, *dims)
    rows = np.flatnonzero(usable)
    for at, fault in inner_faults.items():
        place = f"[{at % size}]" + ("" if fault.startswith("[") else " ")
        faults.setdefault(int(rows[at // size]), place + fault)
    return values, faults


def _leaf(column: Any, dtype: np.dtype[Any], holes: bool) -> tuple[Array, Faults]:
    """Single values → array; nulls, and values that ``dtype`` cannot hold, are faults."""
    faults: Faults = {}
    if column.null_count:
        missing = column.is_null().to_numpy(zero_copy_only=False)
        faults.update((int(row), "is null") for row in np.flatnonzero(missing))
        zero = False if pa.types.is_boolean(column.type) else 0
        column = column.fill_null(pa.scalar(zero, column.type))
    source = column.to_numpy(zero_copy_only=False)
    values, good = cast(source, dtype)
    if holes and source.dtype.kind == "f":
        good |= np.isnan(source)
        values[np.isnan(source)] = np.nan
    for row in np.flatnonzero(~good):
        at = int(row)
        faults.setdefault(at, _refusal(source[at], dtype))
    return values, faults


def cast(source: Array, dtype: np.dtype[Any]) -> tuple[Array, NDArray[np.bool_]]:
    """``source`` as ``dtype``, and where that keeps the value (rounding of floats apart).

    Not kept: NaN and Inf in any dtype, overflow, a fraction in an integer, anything but 0 and 1
    in a bool. Values that are not kept are 0.
    """
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = source.astype(dtype)
        good = np.isfinite(values)
    elif source.dtype.kind == "b":
        return source.astype(dtype), np.ones(source.shape, bool)
    else:
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if source.dtype.kind == "f":
            source = source.astype(np.float64)
            # float(high) may round up to high + 1, which is already out of range.
            top = source <= high if float(high) == high else source < float(high)
            good = np.isfinite(source) & (source == np.trunc(source)) & (source >= low) & top
        else:
            good = (source >= low) & (source <= high)
        values = np.where(good, source, 0).astype(dtype)
    return np.where(good, values, np.zeros((), dtype)), good


def _refusal(value: Any, dtype: np.dtype[Any]) -> str:
    if np.asarray(value).dtype.kind == "f" and not np.isfinite(value):
        return f"is {value}; only finite numbers can be used"
    return f"is {value}, which {dtype} cannot hold"


def texts(column: Any) -> list[str | None]:
    """Every value of a scalar column as text, None for null; numbers as Python writes them."""
    return [None if v is None else str(v) for v in decoded(column).to_pylist()]


def is_text(kind: Any) -> bool:
    """Whether a type is text, dictionary-encoded or not."""
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_list(kind: Any) -> bool:
    """Whether a type is lists, of one length or of several."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def find(batch: Any, name: str, role: str) -> Any:
    """A column of a record batch by name; DataError listing what there is."""
    at: int = batch.schema.get_field_index(name)
    if at < 0:
        have = ", ".join(batch.schema.names)
        raise DataError(f"column {name!r} ({role}) is missing; the table has {have}")
    return batch.column(at)


def merge(into: Faults, name: str, faults: Mapping[int, str]) -> None:
    """Add the faults of column ``name`` to those of the rows; the first one found stays."""
    for row, fault in faults.items():
        into.setdefault(row, f"column {name!r}: {fault}")


def _text(shape: tuple[int, ...]) -> str:
    return "×".join("any" if d == -1 else str(d) for d in shape)
