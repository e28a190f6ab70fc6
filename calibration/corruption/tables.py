"""Tables as a broken feed delivers them: cells missing, noise, a wrong unit, a mixed-up column.

Inputs are N×D or N of any float or integer dtype, one array or several by name. What cells become
is taken from a reference, the columns of a whole data set, and never from the batch. Integers stay
integers within their column's range, since one may be a row of a lookup that has no others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from calibration.corruption import streams
from calibration.corruption.streams import Inputs, Keys, Named
from posthoc.contract import F64, I64, Array, DataError

MISSING = (0.05, 0.1, 0.2, 0.35, 0.5)  # share of cells
NOISE = (0.1, 0.25, 0.5, 1.0, 2.0)  # s.d., of the column's
FACTOR = (1.5, 2.54, 10.0, 100.0, 1000.0)  # of a wrong unit
SHUFFLED = (0.05, 0.1, 0.2, 0.35, 0.5)  # share of cells


@dataclass(frozen=True)
class Column:
    """The distinct finite values of a column, in order, and how often each occurs."""

    values: F64
    counts: I64

    @cached_property
    def ranks(self) -> I64:
        """How many cells hold a value or a smaller one."""
        return np.cumsum(self.counts)

    @cached_property
    def median(self) -> float:
        """The lower median, which is a value of the column."""
        middle = (self.ranks[-1] - 1) // 2
        return float(self.values[np.searchsorted(self.ranks, middle, side="right")])

    @cached_property
    def deviation(self) -> float:
        """Standard deviation."""
        unit = max(float(np.abs(self.values).max()), np.finfo(np.float64).tiny)
        share = self.counts / self.counts.sum()
        x = self.values / unit
        return float(np.sqrt(share @ (x - share @ x) ** 2)) * unit

    def at(self, u: F64) -> F64:
        """The values that lie at the shares ``u`` in [0, 1) of the ordered column."""
        rank = np.minimum((u * self.ranks[-1]).astype(np.int64), self.ranks[-1] - 1)
        found: F64 = self.values[np.searchsorted(self.ranks, rank, side="right")]
        return found


Reference = Mapping[str, tuple[Column | None, ...]]


def measure(
    inputs: Inputs, *, columns: Collection[str] | Collection[int] | None = None
) -> dict[str, tuple[Column | None, ...]]:
    """The columns of each tensor N×D or N (a column then) that holds numbers; None for a column
    that is left alone: one without a finite value, or not among ``columns``.

    ``columns`` are indices where ``inputs`` is one array, else "name" (the whole tensor) or
    "name[3]". Raises DataError, naming the input, for no table, no rows, a column that is not
    there, and integers beyond 2**53.
    """
    tensors = streams.named(inputs)
    tables = {name: x for name, x in tensors.items() if fits(x.dtype, x.shape)}
    if not tables:
        raise DataError(f"{', '.join(map(streams.called, tensors))}: no tensor is N×D numbers")
    named = [columns] if isinstance(columns, str) else columns
    wanted = None if named is None else set(map(str, named))
    found = {name: _columns(name, _flat(x), wanted) for name, x in tables.items()}
    if wanted:
        raise DataError(f"there is no column {', '.join(sorted(wanted))} to corrupt")
    return found


def merge(a: Reference, b: Reference) -> dict[str, tuple[Column | None, ...]]:
    """The reference of the rows of both, exactly."""
    return {
        name: tuple(_joined(c, d) for c, d in zip(held, b[name], strict=True))
        for name, held in a.items()
    }


def fits(dtype: DTypeLike, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can be a table: numbers with one or two axes."""
    return np.dtype(dtype).kind in "fiu" and len(shape) in (1, 2)


def missing(
    inputs: Inputs,
    severity: int,
    *,
    reference: Reference | None = None,
    keys: Array | None = None,
    seed: int = 0,
    fill: Literal["median", "nan"] = "median",
) -> Inputs:
    """The share ``MISSING`` of cells, each by itself, set to the column's lower median; to NaN
    where the model takes that, which only floats hold.

    Like all functions here: ``reference`` is `measure` of the whole data set (None: of these rows),
    ``keys`` (N integers) name the rows (None: their content does). Returns the same shapes and
    dtypes. Raises DataError for a severity that is none, for tables unlike the reference's, and
    where that has no column to corrupt.
    """
    share = streams.level(MISSING, severity)
    if fill not in ("median", "nan"):
        raise DataError(f"missing cells become 'median' or 'nan', not {fill!r}")

    def act(x: F64, starts: Keys, column: Column) -> F64:
        gone = streams.uniforms(starts, 1)[:, 0] < share
        return np.where(gone, np.nan if fill == "nan" else column.median, x)

    return _each("missing", act, inputs, reference, keys, seed, floats=fill == "nan")


def noise(
    inputs: Inputs,
    severity: int,
    *,
    reference: Reference | None = None,
    keys: Array | None = None,
    seed: int = 0,
) -> Inputs:
    """Gaussian noise on every cell, s.d. ``NOISE`` of the column's own."""
    share = streams.level(NOISE, severity)

    def act(x: F64, starts: Keys, column: Column) -> F64:
        return x + share * column.deviation * streams.normals(starts, 1)[:, 0]

    return _each("noise", act, inputs, reference, keys, seed)


def scaled(
    inputs: Inputs,
    severity: int,
    *,
    reference: Reference | None = None,
    keys: Array | None = None,
    seed: int = 0,
) -> Inputs:
    """One column of each row in another unit: times ``FACTOR``.

    Rows draw their columns one by one, so that a mean over rows is one over the columns too; name
    a single column in `measure`, and it is that one in all rows.
    """
    factor = streams.level(FACTOR, severity)
    tensors, found = _known(inputs, reference)
    rows = streams.keys_of(tensors, keys)
    places = [
        (name, j)
        for name in sorted(found)
        for j, column in enumerate(found[name])
        if column is not None
    ]
    drawn = streams.uniforms(streams.streams(rows, seed, "scaled"), 1)[:, 0]
    chosen = (drawn * len(places)).astype(np.int64)
    number = {place: i for i, place in enumerate(places)}

    def act(x: F64, name: str, j: int, column: Column) -> F64:
        return np.where(chosen == number[name, j], x * factor, x)

    return _apply(inputs, tensors, found, act)


def shuffled(
    inputs: Inputs,
    severity: int,
    *,
    reference: Reference | None = None,
    keys: Array | None = None,
    seed: int = 0,
) -> Inputs:
    """The share ``SHUFFLED`` of cells, each by itself, taken from another row: the value at a
    place drawn uniformly from the reference's column."""
    share = streams.level(SHUFFLED, severity)

    def act(x: F64, starts: Keys, column: Column) -> F64:
        u = streams.uniforms(starts, 2)
        return np.where(u[:, 0] < share, column.at(u[:, 1]), x)

    return _each("shuffled", act, inputs, reference, keys, seed)


def _each(
    what: str,
    act: Callable[[F64, Keys, Column], F64],
    inputs: Inputs,
    reference: Reference | None,
    keys: Array | None,
    seed: int,
    floats: bool = False,
) -> Inputs:
    """``act`` on every column of the reference, each with streams of its own."""
    tensors, found = _known(inputs, reference)
    rows = streams.keys_of(tensors, keys)
    whole = [n for n, columns in found.items() if any(columns) and tensors[n].dtype.kind != "f"]
    if floats and whole:
        raise DataError(f"{streams.called(whole[0])} holds integers, and no integer is NaN")

    def column(x: F64, name: str, j: int, known: Column) -> F64:
        return act(x, streams.streams(rows, seed, what, name, str(j)), known)

    return _apply(inputs, tensors, found, column)


def _apply(
    inputs: Inputs,
    tensors: Named,
    reference: Reference,
    act: Callable[[F64, str, int, Column], F64],
) -> Inputs:
    for name, columns in reference.items():
        x = tensors[name]
        out = x.copy()
        for j, known in enumerate(columns):
            if known is None:
                continue
            cells = _flat(x)[:, j]
            with np.errstate(over="ignore"):  # cut to what the dtype holds, just below
                done = act(cells.astype(np.float64), name, j, known)
            ends = (-np.inf, np.inf)
            if x.dtype.kind != "f":
                ends = (float(known.values[0]), float(known.values[-1]))
            # Cells that nothing was done to stay as they are, outside the reference's range too.
            same = done == cells
            _flat(out)[:, j] = np.where(same, cells, streams.held(done, x.dtype, *ends))
        tensors[name] = out
    return streams.like(inputs, tensors)


def _known(inputs: Inputs, reference: Reference | None) -> tuple[Named, Reference]:
    """The tensors, and a reference that they fit."""
    tensors = streams.named(inputs)
    found = measure(inputs) if reference is None else reference
    for name, columns in found.items():
        x = tensors.get(name)
        if x is None or not fits(x.dtype, x.shape) or _flat(x).shape[1] != len(columns):
            raise DataError(f"{streams.called(name)} had {len(columns)} columns when measured")
    if not any(c is not None for columns in found.values() for c in columns):
        raise DataError(f"{', '.join(map(streams.called, found))}: no column has finite numbers")
    return tensors, found


def _flat(x: Array) -> Array:
    """N×D, a view."""
    return x[:, None] if x.ndim == 1 else x


def _columns(name: str, x: Array, wanted: set[str] | None) -> tuple[Column | None, ...]:
    """Takes what it finds out of ``wanted``."""
    if not len(x):
        raise DataError(f"{streams.called(name)} has no rows to measure")
    every = wanted is None or (bool(name) and name in wanted)
    columns: list[Column | None] = []
    taken = {name} if wanted is not None and every else set()
    for j in range(x.shape[1]):
        label = f"{name}[{j}]" if name else str(j)
        if not every and (wanted is None or label not in wanted):
            columns.append(None)
            continue
        taken.add(label)
        values, counts = np.unique(x[:, j][np.isfinite(x[:, j])], return_counts=True)
        if x.dtype.kind != "f" and np.abs(values.astype(np.float64)).max() > streams.EXACT:
            raise DataError(f"{streams.called(name)}: column {j} holds integers beyond 2**53")
        columns.append(Column(values.astype(np.float64), counts) if len(values) else None)
    if wanted is not None:
        wanted -= taken
    return tuple(columns)


def _joined(a: Column | None, b: Column | None) -> Column | None:
    if a is None or b is None:
        return b if a is None else a
    values, where = np.unique(np.concatenate([a.values, b.values]), return_inverse=True)
    counts = np.bincount(where, np.concatenate([a.counts, b.counts]), len(values))
    return Column(values, counts.astype(np.int64))
