"""A table or ``.npz`` → named tensors, by a saved mapping, with bad rows told apart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from posthoc.columns import Faults, decoded, dense, find, is_text, merge, texts
from posthoc.contract import Array, DataError, Task, TensorSpec
from posthoc.mapping import TableMapping, infer_mapping
from posthoc.pixels import drawn_annotator
from posthoc.tables import Table, open_table

__all__ = [
    "Rows",
    "Table",
    "TableMapping",
    "infer_mapping",
    "open_table",
    "split_roles",
    "to_rows",
]


@dataclass(frozen=True)
class Rows:
    """N rows as tensors. Rows in ``bad`` hold zeros, so that batch shapes stay as they were.

    ``inputs`` maps input names to arrays (N, …) of the model's dtype; ``y`` is int64 (N) or
    float64 (N×K); ``bad`` maps a row to what is wrong with it, naming the column; hashes are 64
    bits of BLAKE2b: of the row's input bytes, and of its ``split_by`` value (else the same).
    """

    inputs: dict[str, Array]
    y: Array | None
    bad: dict[int, str]
    ids: list[str] | None
    groups: Array | None
    split_keys: NDArray[np.uint64]
    content_hashes: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.content_hashes)


def to_rows(
    batch: pa.RecordBatch,
    mapping: TableMapping,
    specs: Sequence[TensorSpec],
    *,
    task: Task | None = None,
    classes: Sequence[str] | None = None,
    need_target: bool = False,
    n_classes: int | None = None,
    hashed: bool = True,
    maps: tuple[int, ...] | None = None,
) -> Rows:
    """One record batch as tensors.

    With ``task`` and a mapping that names a target, ``y`` is read where the target columns are
    present (``need_target``: must be). Class names are looked up in ``classes``; integers are
    class indices below ``len(classes)`` or ``n_classes``. Raises DataError for a missing column
    or one of the wrong type; what is wrong with single rows goes to ``bad``.
    ``hashed`` False leaves the content hashes at zero, for a reader that needs none. ``maps`` is
    the shape of a target that is a map: class indices, where any below 0 says that a pixel has no
    label, or values, where NaN says so. Where classes have an axis more, it is that of annotators,
    and one of each row is drawn by its content hash.
    """
    bad: Faults = {}
    inputs = {}
    for spec in specs:
        if spec.name not in mapping.inputs:
            raise DataError(f"the mapping does not say which columns make input {spec.name!r}")
        inputs[spec.name] = _input(batch, mapping.inputs[spec.name], spec, bad)
    y = None
    present = bool(mapping.target) and set(mapping.target) <= set(batch.schema.names)
    if task is not None and (present or need_target):
        if not mapping.target:
            raise DataError("no target column is named; give --target")
        limit = len(classes) if classes is not None else n_classes
        y = (
            _map(batch, mapping.target, task, limit, maps, bad)
            if maps is not None
            else _class_index(batch, mapping.target, classes, limit, bad)
            if task == "classification"
            else _stack(batch, mapping.target, "target", "float64", bad)
        )
    ids = None
    if mapping.id is not None:
        ids = [t or "" for t in _meta(batch, mapping.id, "id", bad)]
    groups = None
    if mapping.group is not None:
        column = decoded(find(batch, mapping.group, "group"))
        named = [t or "" for t in _meta(batch, mapping.group, "group", bad)]
        groups = np.asarray(named)
        if pa.types.is_integer(column.type):
            groups = np.array([int(t) if t else 0 for t in named], np.int64)
    keys = None
    if mapping.split_by is not None:
        keys = _hash_texts(_meta(batch, mapping.split_by, "split", bad))
    for row in bad:
        for array in inputs.values():
            array[row] = 0
        if y is not None:
            y[row] = 0
    hashes = np.zeros(batch.num_rows, np.uint64)
    if hashed:
        hashes = _hash_rows([inputs[s.name] for s in specs], batch.num_rows)
    if maps is not None and y is not None and y.ndim > 1 + len(maps):
        drawn = drawn_annotator(y.reshape(*y.shape[:2], -1), hashes)
        y = drawn.reshape(len(y), *y.shape[2:])
    return Rows(inputs, y, bad, ids, groups, hashes if keys is None else keys, hashes)


def columns_there(table: Table, mapping: TableMapping) -> list[str]:
    """The columns that a mapping needs. Raises DataError for one that the table lacks, listing
    those that it has."""
    needed = list(mapping.columns())
    for name in needed:
        if name not in table.columns:
            role = "target" if name in mapping.target else "input"
            if name in (mapping.id, mapping.group, mapping.split_by):
                role = "id, group or split"
            raise DataError(
                f"{table.path}: column {name!r} ({role}) is missing; the table has "
                f"{', '.join(table.columns)}"
            )
    return needed


def split_roles(
    keys: NDArray[np.uint64], fractions: Mapping[str, float], seed: int
) -> NDArray[np.int8]:
    """Role of each row, as an index into ``fractions``; equal keys share a role.

    A role depends on (key, seed) alone, so it stays when rows come, go or move. Raises DataError
    unless the fractions are positive and sum to 1.
    """
    shares = np.array(list(fractions.values()), np.float64)
    if not (shares > 0).all() or not math.isclose(shares.sum(), 1.0, abs_tol=1e-9):
        raise DataError(f"split fractions must be positive and sum to 1, not {dict(fractions)}")
    salt = _mix(np.array([seed % (1 << 64)], np.uint64))
    uniform = (_mix(keys ^ salt) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(shares.cumsum()[:-1], uniform, side="right").astype(np.int8)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64 (Steele, Lea & Flood 2014, fig. 17)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _input(batch: Any, columns: tuple[str, ...], spec: TensorSpec, bad: Faults) -> Array:
    tail = spec.shape[1:]
    if len(columns) == 1:
        return _column(batch, columns[0], f"input {spec.name!r}", spec.dtype, tail, bad)
    stacked = _stack(batch, columns, f"input {spec.name!r}", spec.dtype, bad)
    free, known = tail.count(-1), math.prod(d for d in tail if d != -1)
    k = len(columns)
    if free > 1 or not tail or (k % known if free else k != known):
        want = "×".join("any" if d == -1 else str(d) for d in tail) or "one"
        raise DataError(
            f"input {spec.name!r} takes {want} values a row and {k} columns fill it "
            f"({', '.join(columns)}); name the right ones with --inputs {spec.name}=a,b,c"
        )
    return stacked.reshape(-1, *(k // known if d == -1 else d for d in tail))


def _column(
    batch: Any, name: str, role: str, dtype: str, shape: tuple[int, ...], bad: Faults
) -> Array:
    column = find(batch, name, role)
    if role.startswith("input") and is_text(column.type):
        raise DataError(
            f"column {name!r}: expected {dtype} for {role}, found {column.type}; in a fit, what is "
            "no input is named with --id, --group or --split-by"
        )
    values, faults = dense(column, name, dtype, shape)
    merge(bad, name, faults)
    return values


def _stack(batch: Any, columns: tuple[str, ...], role: str, dtype: str, bad: Faults) -> Array:
    """N×K from K scalar columns, or from one column of scalars or of lists of one length."""
    if len(columns) == 1:
        listed = find(batch, columns[0], role).type
        shape = (-1,) if pa.types.is_nested(listed) or hasattr(listed, "storage_type") else ()
        return _column(batch, columns[0], role, dtype, shape, bad).reshape(batch.num_rows, -1)
    return np.stack([_column(batch, c, role, dtype, (), bad) for c in columns], axis=1)


def _map(
    batch: Any,
    columns: tuple[str, ...],
    task: Task,
    limit: int | None,
    shape: tuple[int, ...],
    bad: Faults,
) -> Array:
    """Target maps: int64 class indices, or float64 values with NaN where there are none."""
    if len(columns) != 1:
        raise DataError(f"a dense target is one column of maps, not {', '.join(columns)}")
    column = find(batch, columns[0], "target")
    if task == "regression":
        values, faults = dense(column, columns[0], "float64", shape, holes=True)
        merge(bad, columns[0], faults)
        return values
    try:
        y, faults = dense(column, columns[0], "int64", shape)
    except DataError:
        try:  # maps of several annotators
            y, faults = dense(column, columns[0], "int64", (-1, *shape))
        except DataError:
            y, faults = dense(column, columns[0], "int64", shape)  # says what is wrong
        if y.ndim > 1 + len(shape) and y.shape[1] == limit and (y.sum(1) == 1).all():
            raise DataError(
                f"column {columns[0]!r} looks one-hot (its {limit} maps add up to 1 everywhere); "
                "give one map of class indices"
            ) from None
    if limit is not None:
        top = y.reshape(len(y), -1).max(1, initial=-1)
        for r in np.flatnonzero(top >= limit):
            faults.setdefault(
                int(r), f"holds {top[r]}, not a class index below {limit} (or -1 for no label)"
            )
    merge(bad, columns[0], faults)
    return y


def _class_index(
    batch: Any,
    columns: tuple[str, ...],
    classes: Sequence[str] | None,
    limit: int | None,
    bad: Faults,
) -> Array:
    if len(columns) != 1:
        raise DataError(f"classification takes one target column, not {', '.join(columns)}")
    name = columns[0]
    column = find(batch, name, "target")
    if not is_text(column.type):
        y = _column(batch, name, "target", "int64", (), bad)
        wrong = (y < 0) | (y >= (np.iinfo(np.int64).max if limit is None else limit))
        below = "" if limit is None else f" below {limit}"
        faults = {int(r): f"is {y[r]}, not a class index{below}" for r in np.flatnonzero(wrong)}
    else:
        if classes is None:
            raise DataError(
                f"column {name!r}: expected class indices (int64), found {column.type}; "
                "give the class names in output order with --classes"
            )
        index = {c: i for i, c in enumerate(classes)}
        labels = texts(column)
        y = np.array([index.get(t or "", 0) for t in labels], np.int64)
        faults = {
            r: "is null" if t is None else f"is {t!r}, which is not one of the classes"
            for r, t in enumerate(labels)
            if t is None or t not in index
        }
    merge(bad, name, faults)
    return y


def _meta(batch: Any, name: str, role: str, bad: Faults) -> list[str | None]:
    values = texts(find(batch, name, role))
    merge(bad, name, {r: "is null" for r, v in enumerate(values) if v is None})
    return values


def _hash_rows(arrays: Sequence[Array], n: int) -> NDArray[np.uint64]:
    views = []
    for a in arrays:
        width = a.nbytes // max(n, 1)
        views.append((np.ascontiguousarray(a).reshape(-1).view(np.uint8).data, width))
    hashes = bytearray()
    for row in range(n):
        digest = hashlib.blake2b(digest_size=8)
        for view, width in views:
            digest.update(view[row * width : (row + 1) * width])
        hashes += digest.digest()
    return np.frombuffer(bytes(hashes), "<u8").astype(np.uint64)


def _hash_texts(values: Sequence[str | None]) -> NDArray[np.uint64]:
    digests = (hashlib.blake2b((v or "").encode(), digest_size=8).digest() for v in values)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
