"""Predictions as Arrow IPC streams: a table of rows in, a table of answers out.

Imported on the first such request: pyarrow takes a quarter of a second to load, and many servers
never need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from posthoc.columns import decoded, is_list, is_text
from posthoc.contract import Array, TensorSpec
from service import ipc
from service.core import Answer, Refusals
from service.errors import ServiceError, invalid, shorten
from service.friendly import PredictRequest, as_input, group_codes, input_columns, read_options
from service.models import Model
from service.scoring.schema import DESCRIPTIONS, field_columns, nested_column
from service.tensors import MAX_RANK, cast, parse_json

ID = "id"
_NAMES = pa.dictionary(pa.int32(), pa.string())  # a class name takes four bytes wherever it stands


def parse_predict(body: bytes, model: Model, max_rows: int, max_values: int) -> PredictRequest:
    """The request in an Arrow IPC stream, see `service.friendly.read_predict`.

    The columns are the bundle's own, or one for each input by its name; single values,
    lists, and tensors. Row ids are in the bundle's id column, or in ``id``. The schema's metadata
    may hold ``alpha`` and ``outputs`` as JSON, and ``id``. Raises ServiceError 400 naming the row
    and the column at fault, 413 for more than ``max_values`` values.
    """
    mapping = model.predictor.manifest.mapping
    specs = (*model.predictor.inputs, *model.predictor.optional)
    known = {*mapping.columns(), *(s.name for s in specs), ID}
    schema = ipc.read_schema(body, len(known))
    plan = _plan(schema, model, known)
    rows = 0
    parts: dict[str, list[Array]] = {name: [] for name in plan.numbers}
    named: dict[str, list[str | None]] = {name: [] for name in plan.texts}
    for batch in ipc.read_batches(body, [schema.get_field_index(name) for name in plan.columns]):
        start, rows = rows, rows + batch.num_rows
        with Refusals(model, rows):
            if rows > max_rows:
                raise invalid(
                    f"the stream has {rows} rows or more; a request holds 1 to {max_rows}"
                )
            if batch.num_rows == 0:
                continue
            for name in plan.texts:
                named[name] += _texts(batch.column(name), len(body))
            for name in plan.numbers:
                parts[name].append(_values(batch.column(name), name, start))
            if sum(v.size for many in parts.values() for v in many) > max_values:
                raise ServiceError(
                    413, "too_many_values", f"the stream holds more than {max_values} values"
                )
    if rows == 0:
        raise invalid("the stream has no row; a request holds at least one")
    with Refusals(model, rows):
        options = read_options(_options(schema))
        inputs = {
            s.name: _input(parts, plan.inputs[s.name], s) for s in specs if s.name in plan.inputs
        }
        ids = None
        if plan.id is not None:
            ids = [_id(value, row, plan.id) for row, value in enumerate(named[plan.id])]
        if plan.group is not None:
            inputs["group"] = group_codes(model, named[plan.group])
    return PredictRequest(inputs, ids, options)


def encode_predict(answer: Answer) -> bytes:
    """The answer as a stream of one batch: ``id``, then the fields; class names as dictionaries.

    The schema's metadata names ``model``, ``version`` and ``id`` of the request, and each field's
    says what it is.
    """
    model, fields = answer.model, answer.fields
    columns = field_columns(model.predictor.manifest, fields, _NAMES)
    made = {ID: pa.array(answer.ids, pa.string())}
    made |= {n: columns[n] if n in columns else nested_column(v) for n, v in fields.items()}
    schema = pa.schema(
        [pa.field(n, c.type, metadata=_described(n)) for n, c in made.items()],
        {"model": model.name, "version": model.version, "id": answer.id},
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(list(made.values()), schema=schema))
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which columns of a stream are read: inputs' by input, and what names rows and groups."""

    inputs: dict[str, tuple[str, ...]]
    id: str | None
    group: str | None
    numbers: tuple[str, ...] = field(init=False)
    texts: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        every = (name for names in self.inputs.values() for name in names)
        object.__setattr__(self, "numbers", tuple(dict.fromkeys(every)))
        texts = dict.fromkeys(name for name in (self.id, self.group) if name is not None)
        object.__setattr__(self, "texts", tuple(texts))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.numbers, *self.texts)))


def _plan(schema: pa.Schema, model: Model, known: set[str]) -> _Plan:
    predictor = model.predictor
    mapping = predictor.manifest.mapping
    given = set(schema.names)
    if len(given) < len(schema):
        raise invalid("two columns of the stream have one name")
    if unknown := given - known:
        needed = ", ".join(input_columns(mapping))
        raise invalid(
            f"the stream has column {shorten(min(unknown))!r}, which the model does not take "
            f"({shorten(needed, 400)})"
        )
    inputs = {}
    for spec in predictor.inputs:
        columns = mapping.inputs[spec.name]
        if spec.name in given and not given.intersection(columns):
            columns = (spec.name,)
        if missing := [name for name in columns if name not in given]:
            raise invalid(f"the stream has no column {missing[0]!r}")
        inputs[spec.name] = columns
    group = None
    for spec in predictor.optional:
        if spec.name == "group" and mapping.group in given:
            group = mapping.group
        elif spec.name in given and spec.name not in mapping.columns():
            inputs[spec.name] = (spec.name,)
    taken = {name for names in inputs.values() for name in names}
    if twice := given.intersection(s.name for s in predictor.inputs) - taken - {*mapping.columns()}:
        raise invalid(f"the stream has both {min(twice)!r} and the columns that make it")
    ids = [n for n in (mapping.id, ID) if n in given and n not in taken]
    plan = _Plan(inputs, ids[0] if ids else None, group)
    for name in plan.numbers:
        if not _is_numeric(schema.field(name).type):
            raise invalid(f"column {name!r} holds {_shown(schema, name)}; numbers are needed")
    for name in plan.texts:
        kind = schema.field(name).type
        if not (is_text(kind) or pa.types.is_integer(kind)):
            raise invalid(f"column {name!r} holds {_shown(schema, name)}; texts name rows")
    return plan


def _shown(schema: pa.Schema, name: str) -> str:
    return shorten(str(schema.field(name).type))


def _is_numeric(kind: pa.DataType) -> bool:
    """Numbers, lists of numbers, and tensors; single numbers may be dictionary-encoded."""
    if isinstance(kind, pa.FixedShapeTensorType):
        kind = kind.storage_type
    elif isinstance(kind, pa.DictionaryType):
        return _is_number(kind.value_type)
    elif pa.types.is_decimal(kind):
        return True
    depth = 0
    while is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth < MAX_RANK and _is_number(kind)


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def _values(column: pa.Array, name: str, start: int) -> Array:
    """N×… numbers of one column of a batch, whose first row is row ``start`` of the request.

    Lists are of one length: what a row takes is what it holds, and never what another row holds.
    """
    count, tensor = len(column), None
    if isinstance(column.type, pa.FixedShapeTensorType):
        tensor, column = column.type, column.storage
    column = decoded(column)
    sizes: list[int] = []
    while True:
        each = prod(sizes)
        if column.null_count:
            at = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise invalid(f"row {start + at // each}, column {name!r} is null")
        if not is_list(column.type):
            break
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        odd = lengths != lengths[0]
        if odd.any() or lengths[0] == 0:
            at = int(odd.argmax()) // each
            raise invalid(f"row {start + at}, column {name!r} is empty, or not as long as others")
        sizes.append(int(lengths[0]))
        column = column.flatten()
    values: Array = column.to_numpy(zero_copy_only=False).reshape(count, *sizes)
    if tensor is not None:
        order = tensor.permutation or range(len(tensor.shape))
        values = values.reshape(count, *tensor.shape).transpose(0, *(1 + axis for axis in order))
    return values


def _input(parts: dict[str, list[Array]], columns: Sequence[str], spec: TensorSpec) -> Array:
    """One input from its columns, each in the parts that its batches were."""
    whole = []
    for name in columns:
        first = parts[name][0].shape[1:]
        starts = accumulate((len(part) for part in parts[name]), initial=0)
        for part, start in zip(parts[name], starts, strict=False):
            if part.shape[1:] != first:
                raise invalid(f"row {start}, column {name!r} is shaped unlike the rows before it")
        values = np.concatenate(parts[name])
        if values.dtype.kind == "b" and spec.dtype != "bool":
            values = values.view(np.uint8)
        # Before they stand side by side: int64 and uint64 would meet as floats.
        whole.append(cast(values, np.dtype(spec.dtype), f"column {name!r}"))
    if any(values.shape != whole[0].shape for values in whole):
        raise invalid(f"columns {', '.join(columns)} must be of one shape to stand side by side")
    return as_input(np.stack(whole, axis=1), columns, spec)


def _texts(column: pa.Array, most: int) -> list[str | None]:
    """Texts, or whole numbers as texts; ServiceError 400 for more than ``most`` bytes of them."""
    if isinstance(column, pa.DictionaryArray):
        named = _texts(column.dictionary, most)
        return [None if at is None else named[at] for at in column.indices.to_pylist()]
    if pa.types.is_string_view(column.type):
        # Each of many rows may show the same megabytes.
        sizes = np.frombuffer(column.buffers()[1], np.int32)[::4][: len(column)]
        if np.maximum(sizes, 0).sum(dtype=np.int64) > most:
            raise invalid(f"the texts of a column take more than the body's {most} bytes")
    return [None if v is None else str(v) for v in column.to_pylist()]


def _id(value: str | None, row: int, column: str) -> str:
    if value is None:
        raise invalid(f"row {row}, column {column!r} is null; every row needs an id, or none")
    return value


def _options(schema: pa.Schema) -> dict[str, object]:
    """What the schema's metadata says; keys that are not ours are another program's."""
    found = schema.metadata or {}
    options: dict[str, object] = {}
    for key in ("alpha", "outputs"):
        if (value := found.get(key.encode())) is not None:
            options[key] = parse_json(value, f"the schema's metadata {key!r}")
    if (value := found.get(b"id")) is not None:
        options["id"] = value.decode("utf-8", "replace")
    return options


def _described(name: str) -> dict[str, str] | None:
    return {"description": DESCRIPTIONS[name]} if name in DESCRIPTIONS else None
