"""The columns of the output, and predictions as those columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from calibration.bundle import Manifest
from posthoc.contract import Array, DataError, output_fields
from posthoc.mapping import TableMapping

Fields = Mapping[str, Array]

PREFIX = "uq_"
ROW = "row"
_NAMES = pa.string()

DESCRIPTIONS = {
    "row": "index of the row in its source file, from 0",
    "label": "answer of the frozen model (or the module, see the bundle): class name or index",
    "probs": "calibrated probability of each class",
    "confidence": "calibrated probability that the label is right",
    "entropy": "entropy of probs, nats",
    "aleatoric": "part of the entropy that more data would not remove, nats",
    "epistemic": "part of the entropy that more data would remove, nats",
    "set": "classes of the conformal prediction set",
    "set_size": "number of classes in the set",
    "mean": "answer of the frozen model (or the module), in units of the target",
    "std": "total standard deviation, in units of the target",
    "aleatoric_std": "standard deviation that more data would not remove, in units of the target",
    "epistemic_std": "standard deviation that more data would remove, in units of the target",
    "lower": "lower end of the conformal interval, in units of the target",
    "upper": "upper end of the conformal interval, in units of the target",
    "quantiles": "predictive quantiles at the levels of the bundle, in units of the target",
    "ood_score": "strangeness of the row, larger is stranger",
    "ood_pvalue": "conformal p-value of the strangeness",
    "ood": "whether the row is flagged as out of distribution",
    "abstain": "whether the bundle's risk promise asks not to answer",
}

ERRORS = pa.schema(
    [
        pa.field("source", pa.string(), False, {"description": "input file"}),
        pa.field("row", pa.int64(), False, {"description": DESCRIPTIONS[ROW]}),
        pa.field("reason", pa.string(), False, {"description": "why the row has no prediction"}),
    ]
)


def chosen_fields(given: Sequence[str], outputs: Sequence[str]) -> tuple[str, ...]:
    """The fields to write, those in ``outputs`` or all, in the order in which they are ``given``.
    Raises DataError for one that is not."""
    for name in outputs:
        if name not in given:
            raise DataError(f"the bundle gives no {name!r}; it gives {', '.join(given)}")
    return tuple(f for f in given if not outputs or f in outputs)


def kept_columns(
    mapping: TableMapping, passthrough: Sequence[str], source: pa.Schema
) -> tuple[str, ...]:
    """Columns that are copied: the mapping's id where the source has it, and ``passthrough``."""
    ids = (mapping.id,) if mapping.id is not None and mapping.id in source.names else ()
    return tuple(dict.fromkeys((*ids, *passthrough)))


def output_schema(
    manifest: Manifest,
    source: pa.Schema,
    kept: Sequence[str] = (),
    fields: Collection[str] | None = None,
) -> pa.Schema:
    """Columns of the output: ``row``, the ``kept`` columns of the source, the prediction fields
    (those in ``fields``, or all).

    Fields come in the order of ``posthoc.contract``, with a description in each field's metadata.
    Scalars are float32, int64 or bool; ``label`` and ``set`` hold class names where the bundle
    has them; axes of known size are fixed-size lists, others lists; the axis of a single
    regression output is dropped. Maps are fixed-shape tensors in the layout of the model's own
    output, or nested lists where their size is free; in them classes are indices and masks uint8,
    since Arrow has no tensors of bool. A name that a kept column has already takes the prefix
    ``uq_``. Raises DataError when that clashes as well.
    """
    columns = [_described(ROW, pa.int64(), kept)]
    columns += [source.field(name).remove_metadata() for name in kept]
    for name, kind in field_types(manifest).items():
        if fields is None or name in fields:
            columns.append(_described(name, kind, kept))
    schema = pa.schema(columns)
    if len(set(schema.names)) < len(schema):
        raise DataError(
            f"the passed-through columns {', '.join(kept)} take names of the output's own; "
            f"leave out those that begin with {PREFIX!r}"
        )
    return schema


def field_types(manifest: Manifest, names: pa.DataType = _NAMES) -> dict[str, pa.DataType]:
    """Arrow type of each prediction field that the bundle gives, in order; ``names`` is that of a
    class name."""
    specs = {s.name: s for s in manifest.outputs}
    label = pa.int64() if manifest.classes is None else names
    types: dict[str, pa.DataType] = {}
    for name, (dtype, axes) in output_fields(manifest.task).items():
        if name not in specs:
            continue
        dims = specs[name].shape[1:]
        if manifest.dense is not None:
            types[name] = _maps(dtype, dims)
            continue
        if name == "set" and len(dims) == 1:
            types[name] = pa.list_(label)
            continue
        if axes.startswith("K") and len(dims) == len(axes) and dims[0] == 1:
            dims = dims[1:]
        kind = label if name == "label" else pa.from_numpy_dtype(np.dtype(dtype))
        for size in reversed(dims):
            kind = pa.list_(kind, size) if size > 0 else pa.list_(kind)
        types[name] = kind
    return types


def _maps(dtype: str, dims: tuple[int, ...]) -> pa.DataType:
    kind = pa.uint8() if dtype == "bool" else pa.from_numpy_dtype(np.dtype(dtype))
    if -1 not in dims:
        return pa.fixed_shape_tensor(kind, dims)
    for size in reversed(dims):
        kind = pa.list_(kind, size) if size > 0 else pa.list_(kind)
    return kind


def to_table(
    schema: pa.Schema, manifest: Manifest, kept: pa.RecordBatch, rows: Array, fields: Fields
) -> pa.Table:
    """A table of `output_schema`: ``rows`` are indices in the source, one for each answer."""
    columns = field_columns(manifest, fields).values()
    return pa.Table.from_arrays(
        [pa.array(rows, pa.int64()), *kept.columns, *columns], schema=schema
    )


def field_columns(
    manifest: Manifest, fields: Fields, names: pa.DataType = _NAMES
) -> dict[str, pa.Array]:
    """The columns of those ``fields`` that are prediction fields, in the types of `field_types`."""
    named = manifest.classes is not None and manifest.dense is None
    classes = pa.array(manifest.classes, names) if named else None
    columns: dict[str, pa.Array] = {}
    for name, kind in field_types(manifest, names).items():
        if name not in fields:
            continue
        values = fields[name]
        if isinstance(kind, pa.FixedShapeTensorType):
            flat = pa.array(_flat(values, kind.value_type))
            rows_of = pa.FixedSizeListArray.from_arrays(flat, type=kind.storage_type)
            columns[name] = pa.ExtensionArray.from_storage(kind, rows_of)
        elif name == "set" and values.ndim == 2:
            columns[name] = _sets(values, kind, classes)
        elif name == "label" and classes is not None:
            columns[name] = _nested(values, kind, classes)
        else:
            columns[name] = _nested(values, kind, None)
    return columns


def nested_column(values: Array) -> pa.Array:
    """An array N×… as numbers, or as fixed-size lists of them."""
    kind = pa.from_numpy_dtype(values.dtype)
    for size in reversed(values.shape[1:]):
        kind = pa.list_(kind, size)
    return _nested(values, kind, None)


def error_table(source: str, rows: Sequence[int], reasons: Sequence[str]) -> pa.Table:
    """The table of rows that have no prediction."""
    return pa.table([pa.array([source] * len(rows), pa.string()), rows, reasons], schema=ERRORS)


def _described(name: str, kind: pa.DataType, kept: Sequence[str]) -> pa.Field:
    shown = f"{PREFIX}{name}" if name in kept else name
    return pa.field(shown, kind, metadata={"description": DESCRIPTIONS[name]})


def _nested(values: Array, kind: pa.DataType, classes: pa.Array | None) -> pa.Array:
    """An array N×… as scalars or nested lists of ``kind``; an axis of one is dropped to fit."""
    leaf = kind
    while pa.types.is_list(leaf) or pa.types.is_fixed_size_list(leaf):
        leaf = leaf.value_type
    flat = pa.array(_flat(values, leaf))
    if classes is not None:
        flat = classes.take(flat)
    shape = values.shape
    kinds: list[pa.DataType] = []
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        kinds.append(kind)
        kind = kind.value_type
    sizes = list(shape[len(shape) - len(kinds) :])
    for level, size in zip(reversed(kinds), reversed(sizes), strict=True):
        if pa.types.is_fixed_size_list(level):
            flat = pa.FixedSizeListArray.from_arrays(flat, type=level)
        else:
            ends = pa.array(np.arange(len(flat) // size + 1, dtype=np.int32) * np.int32(size))
            flat = pa.ListArray.from_arrays(ends, flat, type=level)
    return flat


def _flat(values: Array, kind: pa.DataType) -> Array:
    """All values in order; masks as bytes where ``kind`` is uint8."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(np.uint8) if pa.types.is_uint8(kind) else flat


def _sets(mask: Array, kind: pa.DataType, classes: pa.Array | None) -> pa.Array:
    """Bool masks N×C as lists of classes."""
    members = pa.array(np.nonzero(mask)[1], pa.int64())
    if classes is not None:
        members = classes.take(members)
    ends = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), members, type=kind)
