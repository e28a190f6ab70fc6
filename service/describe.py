"""Schemas of the OpenAPI document: what each model that is served takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posthoc.contract import TensorSpec, output_fields
from service.envelopes import closed, envelopes, reference
from service.models import Model
from service.settings import Settings

Json = dict[str, Any]

_KINDS = {"b": "boolean", "f": "number"}
_MAY_BE_NULL = frozenset({"lower", "upper", "quantiles"})  # infinite, which JSON cannot say


def components(models: Mapping[str, Model], settings: Settings) -> dict[str, Json]:
    """Every schema by name; those of a model end in its name."""
    found = envelopes(sorted(models))
    for name, model in models.items():
        found[f"PredictRequest.{name}"] = _request(model, settings)
        found[f"PredictResponse.{name}"] = _response(model)
    return found


def _request(model: Model, settings: Settings) -> Json:
    max_rows, nulls = settings.max_rows, settings.nonfinite == "allow"
    predictor = model.predictor
    mapping = predictor.manifest.mapping
    columns: Json = {name: {} for name in mapping.columns()}
    for spec in predictor.inputs:
        names = mapping.inputs[spec.name]
        for name in names:
            columns[name] = _nested(spec, 1 if len(names) == 1 else len(spec.shape), nulls)
    row = closed(columns, [n for names in mapping.inputs.values() for n in names])
    tensors = {
        spec.name: _rows(_nested(spec, 1, nulls and spec in predictor.inputs), max_rows)
        for spec in (*predictor.inputs, *predictor.optional)
    }
    alpha = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    request = closed(
        {
            "rows": _rows(row, max_rows) | {"description": "objects by column name"},
            "inputs": closed(tensors, [s.name for s in predictor.inputs]),
            "alpha": {
                "anyOf": [alpha, _rows(alpha, max_rows)],
                "description": "one level for all rows, or one each",
            },
            "id": reference("Id"),
            "ids": _rows(reference("Id"), max_rows) | {"uniqueItems": True},
            "outputs": {
                "type": "array",
                "items": {"type": "string", "enum": [s.name for s in model.outputs]},
            },
        }
    )
    # Rows by column name, or tensors by input, and not both.
    return request | {"oneOf": [{"required": ["rows"]}, {"required": ["inputs"]}]}


def _response(model: Model) -> Json:
    fields: Json = {"id": reference("Id")}
    for spec in model.outputs:
        fields[spec.name] = _field(spec, model)
    response = {
        "model": {"type": "string", "const": model.name},
        "version": {"type": "string", "const": model.version},
        "id": reference("Id"),
        "predictions": {"type": "array", "minItems": 1, "items": closed(fields, ["id"])},
    }
    needed = list(response)
    if model.dense is not None and model.classes is not None:
        response["classes"] = {"type": "array", "const": list(model.classes)}
    return closed(response, needed)


def _field(spec: TensorSpec, model: Model) -> Json:
    """One field of one row, as `service.friendly.predictions` writes it."""
    manifest = model.predictor.manifest
    axes = output_fields(model.task).get(spec.name, ("", None))[1]
    dims, leaf = list(spec.shape[1:]), _number(spec)
    if spec.name in _MAY_BE_NULL or spec.name not in model.fields:
        leaf = leaf | {"type": [leaf["type"], "null"]}
    levels = [format(q, "g") for q in manifest.quantile_levels]
    if model.dense is not None:
        if spec.name == "quantiles":
            return closed({level: _lists(leaf, dims[:-1]) for level in levels}, levels)
        return _lists(leaf, dims)
    name = {"type": "integer", "minimum": 0}
    if model.classes is not None:
        name = {"type": "string", "enum": list(model.classes)}
    if spec.name == "label" and not dims:
        return name
    if spec.name == "set" and len(dims) == 1:
        return {"type": "array", "items": name, "maxItems": model.width}
    if axes in ("K", "KQ") and len(dims) == len(axes) and dims[0] == 1:
        dims = dims[1:]
        if axes == "KQ":
            return closed(dict.fromkeys(levels, leaf), levels)
    return _lists(leaf, dims)


def _nested(spec: TensorSpec, after: int, nulls: bool) -> Json:
    """The values of one row of an input, after its first axes; ``nulls``: one may be missing."""
    leaf = _number(spec)
    if nulls and leaf["type"] == "number":
        leaf = {"type": ["number", "null"]}
    return _lists(leaf, spec.shape[after:])


def _number(spec: TensorSpec) -> Json:
    return {"type": _KINDS.get(np.dtype(spec.dtype).kind, "integer")}


def _lists(leaf: Json, dims: Sequence[int]) -> Json:
    for size in reversed(dims):
        leaf = {"type": "array", "items": leaf}
        if size >= 0:
            leaf |= {"minItems": size, "maxItems": size}
    return leaf


def _rows(row: Json, most: int) -> Json:
    return {"type": "array", "minItems": 1, "maxItems": most, "items": row}
