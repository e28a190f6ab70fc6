"""Real rows to open a model with: the first usable and distinct ones of a table, or of a file."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from posthoc.columns import decoded, dense, find
from posthoc.contract import Array, DataError, ModelError, TensorSpec
from posthoc.data import Table, TableMapping, infer_mapping, open_table, to_rows

_ROWS = 32
_FEWEST = 8  # fewer distinct rows would show little of a model
_BATCH, _BATCHES = 64, 16
_CHOICES = 16


@dataclass(frozen=True)
class Samples:
    """A table, opened when it is needed, and which of its columns are what: see
    `posthoc.data.infer_mapping`."""

    data: str | Path
    target: Sequence[str] | str | None = None
    inputs: Mapping[str, Sequence[str]] | None = None
    group: str | None = None
    split_by: str | None = None
    id: str | None = None

    @cached_property
    def table(self) -> Table:
        """The table. Raises DataError as `posthoc.data.open_table` does."""
        return open_table(self.data)

    def mapping(self, specs: Sequence[TensorSpec]) -> TableMapping:
        """The mapping from the table to these inputs. Raises DataError as `infer_mapping` does."""
        return infer_mapping(
            self.table.columns,
            specs,
            target=self.target,
            inputs=self.inputs,
            group=self.group,
            split_by=self.split_by,
            id=self.id,
        )

    def names(self, input: str) -> bool:
        """Whether the user or a column names this input."""
        return input in (self.inputs or {}) or input in self.table.columns

    def rows(self, specs: Sequence[TensorSpec]) -> dict[str, Array] | None:
        """Up to 32 distinct rows without a fault; None where the first 1,024 have fewer than 8."""
        mapping = self.mapping(specs).inputs_only()
        kept: list[dict[str, Array]] = []
        seen: set[int] = set()
        batches = self.table.batches(_BATCH, mapping.columns())
        for batch in itertools.islice(batches, _BATCHES):
            read = to_rows(batch, mapping, specs)
            for row, key in enumerate(read.content_hashes.tolist()):
                if row not in read.bad and key not in seen and len(seen) < _ROWS:
                    seen.add(key)
                    kept.append({k: v[row : row + 1] for k, v in read.inputs.items()})
            if len(seen) == _ROWS:
                break
        # Rows of a free axis may differ in length from batch to batch.
        kept = [k for k in kept if all(k[s.name].shape == kept[0][s.name].shape for s in specs)]
        if len(kept) < _FEWEST:
            return None
        return {s.name: np.concatenate([k[s.name] for k in kept]) for s in specs}

    def choices(
        self, names: Sequence[str], floats: str, beside: Sequence[TensorSpec] = ()
    ) -> Iterator[tuple[TensorSpec, ...]]:
        """What the columns of inputs of unknown type may be, the likeliest first.

        Several columns are N×K, one column of lists or tensors N×its shape, one of fractions N×1
        and one of integers N. Fractions are ``floats``, integers int64, booleans bool; integers
        and booleans may also stand for ``floats``. ``beside`` are the other inputs.
        """
        unknown = [TensorSpec(name=n, dtype=floats, shape=(-1,)) for n in names]
        mapping = self.mapping([*beside, *unknown])
        wanted = dict.fromkeys(c for n in names for c in mapping.inputs[n])
        batch = next(self.table.batches(_BATCH, list(wanted)))
        each = [_readings(batch, mapping.inputs[n], n, floats) for n in names]
        return itertools.islice(itertools.product(*each), _CHOICES)


@dataclass(frozen=True, slots=True)
class Givers:
    """Who gives real rows: a table, else the arrays of an example file (``path``)."""

    samples: Samples | None
    given: dict[str, Array] | None
    path: str

    def names(self, input: str) -> bool:
        """Whether the user or a column names this input."""
        by_table = self.samples is not None and self.samples.names(input)
        return by_table or input in (self.given or {})

    def known(self, specs: Sequence[TensorSpec]) -> dict[str, Array] | None:
        """Rows for inputs of known types and shapes; None where there are none."""
        found = None if self.given is None else chosen(self.given, specs, self.path)
        rows = None if self.samples is None else self.samples.rows(specs)
        return found if rows is None else rows

    def needed(self, specs: Sequence[TensorSpec]) -> dict[str, Array]:
        """Rows for these inputs. Raises ModelError where there are none."""
        rows = self.known(specs)
        if rows is None:
            where = "" if self.samples is None else f"{self.samples.data} has too few, so "
            raise ModelError(
                f"a torch model is exported on {_FEWEST} or more distinct real rows: {where}"
                "give some with --example"
            )
        return rows

    def readings(
        self, names: Sequence[str], floats: str, beside: Sequence[TensorSpec]
    ) -> Iterator[tuple[TensorSpec, ...]]:
        """What inputs of unknown types and shapes may be, the likeliest first."""
        if not names:
            return iter([()])
        if self.given is not None:
            lacking = [n for n in names if n not in self.given]
            if lacking:
                raise ModelError(f"{self.path} has no array for input {', '.join(lacking)}")
            arrays = [(n, self.given[n]) for n in names]
            return iter([tuple(_spec(n, a) for n, a in arrays)])
        if self.samples is None:
            raise ModelError("a torch module is exported on real rows; give some with --example")
        return self.samples.choices(names, floats, beside)


def _spec(name: str, array: Array) -> TensorSpec:
    return TensorSpec(name=name, dtype=str(array.dtype), shape=(-1, *array.shape[1:]))


def _readings(
    batch: pa.RecordBatch, columns: Sequence[str], name: str, floats: str
) -> list[TensorSpec]:
    """What one input may be: its columns as they are, then as fractions."""
    found = [_kind(find(batch, c, f"input {name!r}"), c) for c in columns]
    kinds = {kind for kind, _ in found}
    kind = kinds.pop() if len(kinds) == 1 else "int64" if kinds == {"int64", "bool"} else floats
    if any(shape for _, shape in found) and len(columns) > 1:
        raise DataError(
            f"input {name!r} takes one column of lists or several of numbers, not "
            f"{', '.join(columns)}"
        )
    shape = (len(columns),) if len(columns) > 1 else found[0][1]
    as_floats = TensorSpec(name=name, dtype=floats, shape=(-1, *(shape or (1,))))
    if kind in ("int64", "bool"):
        return [TensorSpec(name=name, dtype=kind, shape=(-1, *shape)), as_floats]
    return [as_floats]


def _kind(column: Any, name: str) -> tuple[str, tuple[int, ...]]:
    """Kind of the numbers of a column ("int64", "bool" or ""), and the shape of a row."""
    leaf, depth = decoded(column).type, 0
    if isinstance(leaf, pa.FixedShapeTensorType):
        leaf, depth = leaf.value_type, len(leaf.shape)
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    while any(is_list(leaf) for is_list in lists):
        leaf, depth = leaf.value_type, depth + 1
    values, _ = dense(column, name, "float64", (-1,) * depth)
    kind = "int64" if pa.types.is_integer(leaf) else "bool" if pa.types.is_boolean(leaf) else ""
    return kind, values.shape[1:]


def example(path: str | Path) -> dict[str, Array]:
    """The arrays of an ``.npz`` file by input name: rows in axis 0, as many in each.

    Raises ModelError, naming the file, for one that is damaged or holds anything else.
    """
    try:
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {k: np.asarray(file[k]) for k in file.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        raise ModelError(f"{path} is not an .npz file of arrays by input name: {e}") from e
    lengths = {len(a) if a.ndim else 0 for a in arrays.values()}
    numbers = all(a.dtype.kind in "fiub" for a in arrays.values())
    if len(lengths) != 1 or 0 in lengths or not numbers:
        raise ModelError(f"{path} must hold numbers by input name, with as many rows in each")
    return arrays


def chosen(arrays: Mapping[str, Array], specs: Sequence[TensorSpec], path: str) -> dict[str, Array]:
    """The arrays of an example as a model's inputs. Raises ModelError where they do not fit."""
    found = {}
    for spec in specs:
        if spec.name not in arrays:
            raise ModelError(f"{path} has no array for input {spec.name!r}")
        array, tail = arrays[spec.name], spec.shape[1:]
        fits = len(tail) == array.ndim - 1 and all(
            w in (-1, d) for w, d in zip(tail, array.shape[1:], strict=True)
        )
        if not fits or not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            raise ModelError(
                f"{path}: {spec.name!r} holds {array.dtype} rows of shape {array.shape[1:]}, the "
                f"model takes {spec.dtype} of shape {tail}"
            )
        found[spec.name] = array.astype(spec.dtype)
    return found
