"""Schemas of the OpenAPI document that are the same whatever is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.ids import ID_LENGTH
from service.protocol import DATATYPES
from service.tensors import MAX_RANK

Json = dict[str, Any]

TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_SHARE: Json = {"type": ["number", "null"]}  # null: of no rows
_SHAPE: Json = {"type": "array", "items": {"type": "integer"}, "maxItems": MAX_RANK}
_DATATYPE: Json = {"type": "string", "enum": list(DATATYPES)}


def reference(name: str) -> Json:
    """A reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def closed(properties: Mapping[str, Json], required: Sequence[str] = ()) -> Json:
    """An object of these properties and no other."""
    return {
        "type": "object",
        "properties": dict(properties),
        "additionalProperties": False,
        **({"required": list(required)} if required else {}),
    }


def envelopes(models: Sequence[str]) -> dict[str, Json]:
    """Every such schema by name; ``models`` are the names that are served."""
    return {
        "Id": {"type": "string", "pattern": rf"^[A-Za-z0-9._:\-]{{1,{ID_LENGTH}}}$"},
        "Error": _whole(error=_whole(code=TEXT, message=TEXT, request_id=reference("Id"))),
        "OipError": _whole(error=TEXT),
        "Live": _whole(live={"const": True}),
        "Ready": _whole(
            ready={"type": "boolean"},
            unavailable={"type": "array", "items": TEXT, "description": "models that are not"},
        ),
        **_labels(models),
        **_protocol(),
    }


def _whole(**properties: Json) -> Json:
    """A closed object, all of whose properties are always there."""
    return closed(properties, list(properties))


def _labels(models: Sequence[str]) -> dict[str, Json]:
    number: Json = {"type": "number"}
    label = {"anyOf": [TEXT, number, {"type": "array", "minItems": 1, "items": number}]}
    result = {
        "enum": ["accepted", "duplicate", "conflict", "invalid", "pending", "spooled"],
    }
    model = _shares("accuracy", "expected_accuracy", "ece", "debiased_ece", "ece_noise_floor")
    model |= _shares("stratified_accuracy", "stratified_ece", "stratified_ece_noise_floor")
    model |= _shares("stratified_share")
    bias = "expected_accuracy_bias"
    model |= _shares(bias, f"{bias}_error", f"{bias}_spread")
    model |= _shares(f"stratified_{bias}", f"stratified_{bias}_error")
    model |= _shares("log_loss", "brier", "rmse", "mae", "crps", "label_coverage", "oldest")
    return {
        "Label": closed(
            {
                "id": reference("Id"),
                "label": label | {"description": "class name or index, number or numbers"},
                "model": {"enum": [*models, None], "description": "where several are served"},
            },
            ["id", "label"],
        ),
        "LabelResults": _whole(
            counts={"type": "object", "additionalProperties": _COUNT},
            results={"type": "array", "items": _whole(id=reference("Id"), result=result)},
        ),
        "Forgotten": _whole(id=reference("Id"), forgotten={"const": True}),
        "Calibration": _whole(
            since=_SHARE,
            models={
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["model", "version", "task", "served", "labelled"],
                    "properties": {
                        **{"model": TEXT, "version": TEXT},
                        "task": {"enum": ["classification", "regression"]},
                        **{"served": _COUNT, "labelled": _COUNT},
                        "coverage": {"type": "object", "description": "by level"},
                        "bins": {"type": "array", "items": {"type": "object"}},
                        **model,
                    },
                },
            },
            feedback={"type": "object", "description": "labels by model and result"},
        ),
    }


def _protocol() -> dict[str, Json]:
    data = {"type": "array", "description": "values in order, flat or nested"}
    inner: Json = {
        "name": TEXT,
        "shape": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0},
            "maxItems": MAX_RANK,
        },
        "datatype": _DATATYPE,
        "data": data,
    }
    parameters = {"type": ["object", "null"], "properties": {"binary_data_size": _COUNT}}
    wanted = {"type": ["object", "null"], "properties": {"binary_data": {"type": "boolean"}}}
    options = {
        "type": ["object", "null"],
        "properties": {
            "alpha": {"type": ["number", "null"]},
            "binary_data_output": {"type": "boolean"},
        },
    }
    tensor = _whole(name=TEXT, datatype=_DATATYPE, shape=_SHAPE)
    return {
        "InferRequest": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": {"type": ["string", "null"]},
                "parameters": options,
                "inputs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "shape", "datatype"],
                        "properties": {**inner, "parameters": parameters},
                    },
                },
                "outputs": {
                    "type": ["array", "null"],
                    "items": {
                        "type": "object",
                        "required": ["name"],
                        "properties": {"name": TEXT, "parameters": wanted},
                    },
                },
            },
        },
        "InferResponse": _whole(
            model_name=TEXT,
            model_version=TEXT,
            id=reference("Id"),
            outputs={"type": "array", "items": _whole(**inner)},
        ),
        "ServerMetadata": _whole(
            name=TEXT,
            version=TEXT,
            extensions={"type": "array", "items": TEXT},
            models={"type": "array", "items": TEXT},
            unavailable={"type": "object", "additionalProperties": TEXT, "description": "why"},
        ),
        "ModelMetadata": _whole(
            name=TEXT,
            versions={"type": "array", "items": TEXT},
            platform=TEXT,
            inputs={"type": "array", "items": tensor},
            outputs={"type": "array", "items": tensor},
            parameters={"type": "object"},
        ),
        "ModelReady": _whole(name=TEXT, ready={"type": "boolean"}),
    }


def _shares(*names: str) -> dict[str, Json]:
    return dict.fromkeys(names, _SHARE)
