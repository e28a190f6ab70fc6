"""Plain JSON for people: rows by column name in, one object per row out, with names for classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from calibration.conformal.cells import UNKNOWN
from posthoc.contract import Array, TensorSpec, output_fields
from posthoc.mapping import TableMapping
from service.core import Answer, Refusals
from service.errors import ServiceError, invalid, shorten
from service.models import Model
from service.tensors import kind, number_array, parse_object

_KEYS = frozenset({"rows", "inputs", "alpha", "id", "ids", "outputs"})
# Long for many classes, or as maps; asked for by "outputs".
_HIDDEN = frozenset({"probs"})
_HIDDEN_MAPS = _HIDDEN | {"set", "quantiles"}


@dataclass(frozen=True, slots=True)
class Options:
    """What a request may say beside its rows."""

    alpha: float | list[float] | None
    id: str | None
    outputs: list[str] | None


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """A request of ``/v1/predict``, checked as far as that needs no model weights."""

    inputs: dict[str, Array]
    ids: list[str] | None
    options: Options


def parse_predict(body: bytes, model: Model, nulls: bool = False) -> PredictRequest:
    """The request in ``body`` for ``model``; see `read_predict`."""
    return read_predict(parse_object(body), model, nulls)


def read_predict(request: Mapping[str, Any], model: Model, nulls: bool = False) -> PredictRequest:
    """A request object: ``rows`` by column name or ``inputs`` by tensor, and options.

    Options are ``alpha`` (one number, or one per row), ``id``, ``ids`` (one per row, default: the
    bundle's id column where rows have it) and ``outputs`` (names). The other columns that the
    bundle's table had may be there and are not used. With ``nulls``, null is a missing value, NaN,
    where a number is needed. Raises ServiceError 400 naming the key, the
    row and the column at fault.
    """
    for key in request:
        if key not in _KEYS:
            raise invalid(f"unknown key {shorten(key)!r}; there are {', '.join(sorted(_KEYS))}")
    rows, tensors = request.get("rows"), request.get("inputs")
    if (rows is None) == (tensors is None):
        raise invalid("give either 'rows' (objects by column name) or 'inputs' (tensors by name)")
    manifest = model.predictor.manifest
    options = read_options(request)
    ids = _texts(request.get("ids"), "ids")
    with Refusals(model, _length(rows, tensors)):
        if rows is None:
            inputs = _tensors(tensors, nulls)
        else:
            inputs = _rows(rows, manifest.mapping, manifest.inputs, nulls)
            inputs |= _group_column(rows, model)
            if options.id is None and ids is None:
                ids = _id_column(rows, manifest.mapping.id)
    return PredictRequest(inputs, ids, options)


def read_options(request: Mapping[str, Any]) -> Options:
    """``alpha``, ``id`` and ``outputs`` of a request. Raises ServiceError 400 naming the key."""
    return Options(
        alpha=_alpha(request.get("alpha")),
        id=_text(request.get("id"), "id"),
        outputs=_texts(request.get("outputs"), "outputs"),
    )


def default_outputs(model: Model) -> list[str]:
    """The fields that an answer holds when none are asked for."""
    hidden = _HIDDEN if model.dense is None else _HIDDEN_MAPS
    return [name for name in model.fields if name not in hidden]


def encode_predict(answer: Answer) -> bytes:
    """The answer as strict JSON: what is not finite is ``null``."""
    return orjson.dumps(response(answer), option=orjson.OPT_SERIALIZE_NUMPY)


def response(answer: Answer) -> dict[str, Any]:
    """The answer as an object; numbers may still be numpy scalars and arrays.

    Beside maps of class indices stand the names of the classes, where the bundle has them.
    """
    model = answer.model
    named = model.dense is not None and model.classes is not None
    return {
        "model": model.name,
        "version": model.version,
        "id": answer.id,
        **({"classes": model.classes} if named else {}),
        "predictions": predictions(answer),
    }


def predictions(answer: Answer) -> list[dict[str, Any]]:
    """One object per row: its id, then the fields.

    Labels and sets are class names where the bundle has names, else indices. A regression of one
    output gives plain numbers, and its quantiles an object by level. Maps are nested lists in the
    layout of the model's own output, of class indices and masks; quantiles an object of maps.
    """
    column = _column if answer.model.dense is None else _maps
    columns = {name: column(name, value, answer.model) for name, value in answer.fields.items()}
    return [
        dict(zip(("id", *columns), row, strict=True))
        for row in zip(answer.ids, *columns.values(), strict=True)
    ]


def _column(name: str, value: Array, model: Model) -> list[Any]:
    """One field as one value per row."""
    manifest = model.predictor.manifest
    axes = output_fields(manifest.task).get(name, ("", None))[1]
    classes = manifest.classes
    if name == "label" and value.ndim == 1:
        labels: list[int] = value.tolist()
        return labels if classes is None else [classes[label] for label in labels]
    if name == "set" and value.ndim == 2:
        members = (np.flatnonzero(row).tolist() for row in value)
        return [m if classes is None else [classes[c] for c in m] for m in members]
    if axes in ("K", "KQ") and value.ndim == len(axes) + 1 and value.shape[1] == 1:
        value = value[:, 0]
        if axes == "KQ":
            levels = [format(q, "g") for q in manifest.quantile_levels]
            return [dict(zip(levels, row, strict=True)) for row in value]
    # numpy float32 scalars keep their short decimal form in JSON, Python floats would not.
    return value.tolist() if value.dtype.kind in "biu" else list(value)


def _maps(name: str, value: Array, model: Model) -> list[Any]:
    """One field as one map per image."""
    if name != "quantiles":
        return list(np.ascontiguousarray(value))  # as JSON can have them without a copy
    levels = [format(q, "g") for q in model.predictor.manifest.quantile_levels]
    maps = np.ascontiguousarray(np.moveaxis(value, -1, 1))
    return [dict(zip(levels, image, strict=True)) for image in maps]


def _length(rows: Any, tensors: Any) -> int:
    """How many rows were meant, whatever else is wrong with them."""
    lists = [rows, *(tensors.values() if isinstance(tensors, dict) else ())]
    return max((len(value) for value in lists if isinstance(value, list)), default=0)


def _rows(
    rows: Any, mapping: TableMapping, specs: Sequence[TensorSpec], nulls: bool
) -> dict[str, Array]:
    if not isinstance(rows, list) or not rows:
        raise invalid("'rows' must be a list of at least one object")
    for at, row in enumerate(rows):
        if not isinstance(row, dict):
            raise invalid(f"row {at} is a JSON {kind(row)}; an object of columns is needed")
    known = mapping.columns()
    for at, row in enumerate(rows):
        if extra := row.keys() - known:
            needed = ", ".join(input_columns(mapping))
            raise invalid(
                f"row {at} has column {shorten(min(extra))!r}, which the model does not take "
                f"({shorten(needed, 400)})"
            )
    return {spec.name: _input(rows, mapping.inputs[spec.name], spec, nulls) for spec in specs}


def _id_column(rows: Sequence[Mapping[str, Any]], column: str | None) -> list[str] | None:
    """The ids that the rows carry in the bundle's own id column, when all of them do."""
    if column is None or not all(isinstance(row.get(column), str | int) for row in rows):
        return None
    return [str(row[column]) for row in rows]


def _group_column(rows: Sequence[Mapping[str, Any]], model: Model) -> dict[str, Array]:
    """The input ``group`` from the bundle's own column of groups; a row without one has none."""
    column = model.predictor.manifest.mapping.group
    if column is None or not any(s.name == "group" for s in model.predictor.optional):
        return {}
    named = [row.get(column) for row in rows]
    for at, value in enumerate(named):
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise invalid(f"row {at}, column {column!r}: a group is a text or a whole number")
    return {"group": group_codes(model, [None if v is None else str(v) for v in named])}


def group_codes(model: Model, named: Sequence[str | None]) -> Array:
    """The input ``group`` of rows whose group is named, or None."""
    codes = model.predictor.group_codes(np.asarray(["" if v is None else v for v in named]))
    return np.where([v is None for v in named], UNKNOWN, codes)


def input_columns(mapping: TableMapping) -> list[str]:
    """The columns that make the model's inputs, in order, once each."""
    return list(dict.fromkeys(c for columns in mapping.inputs.values() for c in columns))


def _input(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], spec: TensorSpec, nulls: bool
) -> Array:
    """One input from its columns: several numbers stacked in order, or one column of lists."""
    try:
        values = [[row[column] for column in columns] for row in rows]
    except KeyError as e:
        at = next(n for n, row in enumerate(rows) if e.args[0] not in row)
        raise invalid(f"row {at} has no column {e.args[0]!r}") from None
    if spec.dtype != "bool":
        values = [[int(v) if v is True or v is False else v for v in row] for row in values]
    try:
        array = number_array(values, "the rows", nulls)
    except ServiceError:
        _blame(values, columns, nulls)
        raise
    return as_input(array, columns, spec)


def as_input(array: Array, columns: Sequence[str], spec: TensorSpec) -> Array:
    """One input from N×K×… values of its K columns, in the shape that ``spec`` wants.

    Raises ServiceError 400 where they are too many or too few for it.
    """
    rows = len(array)
    tail = spec.shape[1:]
    free = sum(d < 0 for d in tail)
    size = array.size // rows
    known = int(np.prod([d for d in tail if d > 0], dtype=np.int64))
    if free > 1:
        # Only the list's own shape can say how the free axes divide the values.
        return array.reshape(rows, *(array.shape[2:] if len(columns) == 1 else (size,)))
    if size != known if not free else (not known or size % known):
        raise invalid(
            f"columns {', '.join(columns)} hold {size} values a row; input {spec.name!r} takes "
            f"{'×'.join('any' if d < 0 else str(d) for d in tail) or 'one'}"
        )
    return array.reshape(rows, *(size // known if d < 0 else d for d in tail))


def _blame(values: Sequence[Sequence[Any]], columns: Sequence[str], nulls: bool) -> None:
    """Raise for the first value that is no number, or is shaped unlike the one above it."""
    shape: dict[str, tuple[int, ...]] = {}
    for at, row in enumerate(values):
        for column, value in zip(columns, row, strict=True):
            where = f"row {at}, column {column!r}"
            found = number_array([value], where, nulls).shape
            if shape.setdefault(column, found) != found:
                raise invalid(f"{where} is shaped unlike the rows before it")


def _tensors(tensors: Any, nulls: bool) -> dict[str, Array]:
    if not isinstance(tensors, dict):
        raise invalid("'inputs' must be an object of tensors by name")
    arrays = {}
    for name, data in tensors.items():
        where = f"input {shorten(name)!r}"
        if not isinstance(data, list):
            raise invalid(f"{where} must be a list of rows")
        arrays[name] = number_array(data, where, nulls)
    return arrays


def _alpha(value: Any) -> float | list[float] | None:
    if value is None:
        return None
    many = value if isinstance(value, list) else [value]
    if not all(isinstance(a, float | int) and not isinstance(a, bool) for a in many):
        raise invalid("'alpha' must be a number, or a list of one number per row")
    return [float(a) for a in many] if isinstance(value, list) else float(value)


def _text(value: Any, key: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise invalid(f"'{key}' must be a string")
    return value


def _texts(value: Any, key: str) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise invalid(f"'{key}' must be a list of strings")
    return value
