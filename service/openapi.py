"""The OpenAPI document of every route, with the models that are served: names, shapes, examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service import describe, media
from service.access import OPEN, ROUTE_ROLES
from service.envelopes import reference
from service.errors import is_oip
from service.examples import example_infer, example_label, example_request
from service.models import Model
from service.protocol import HEADER_LENGTH
from service.settings import Settings

Json = dict[str, Any]

_PAGES = "text/html"
# What a status means wherever it stands.
_REASONS = {
    400: "The request is wrong; the message names the part, the row and the fix",
    401: "No key, or one that is not known",
    403: "The key has another role; or there are no keys, and the client is on another machine",
    404: "No such model, version or prediction",
    408: "The body did not come in time",
    413: "Too large: the body, its values, or the answer",
    415: "A media type, or a Content-Encoding, that is not taken",
    422: "It cannot be answered: no finite answer to the row, or labels of maps",
    500: "The server failed",
    503: "Full, stopping or not ready, or the model is broken; try again after Retry-After seconds",
    504: "No answer in time",
}
_BODY = (400, 408, 413, 415)


@dataclass(frozen=True, slots=True)
class _Operation:
    """One method of one path; ``answers`` and ``takes`` map media types to schemas."""

    method: str
    path: str
    tag: str
    summary: str
    answers: Mapping[str, Json]
    takes: Mapping[str, Json] = field(default_factory=dict)
    others: Mapping[int, tuple[str, str]] = field(default_factory=dict)  # more than errors
    fails: tuple[int, ...] = ()
    parameters: Sequence[Json] = ()
    description: str = ""
    headers: Mapping[str, Json] = field(default_factory=dict)


def document(
    models: Mapping[str, Model], settings: Settings, *, version: str, parts: Sequence[str]
) -> Json:
    """The OpenAPI 3.1 document of a server of these models; ``parts`` are the files below
    ``/page/``."""
    paths: dict[str, Json] = {}
    for operation in _operations(models, parts):
        paths.setdefault(operation.path, {})[operation.method] = _written(operation, settings)
    schemes = {
        "key": {"type": "http", "scheme": "bearer", "description": "hedged keys add FILE NAME"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "password": {"type": "http", "scheme": "basic", "description": "any name, and the key"},
    }
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Hedged",
            "version": version,
            "summary": "Predictions of frozen models, with honest error bars",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "predict", "description": "Rows in, predictions out"},
            {"name": "labels", "description": "What was true, and what that says"},
            {"name": "inference protocol", "description": "Open Inference Protocol, version 2"},
            {"name": "operation", "description": "Health and metrics"},
            {"name": "pages", "description": "For people"},
        ],
        "paths": paths,
        "components": {
            "schemas": describe.components(models, settings),
            **({} if settings.keys is None else {"securitySchemes": schemes}),
        },
    }


def _operations(models: Mapping[str, Model], parts: Sequence[str]) -> Iterable[_Operation]:
    yield from _predictions(models)
    yield from _labels(models)
    yield from _protocol(models)
    yield from _rest(parts)


def _predictions(models: Mapping[str, Model]) -> Iterable[_Operation]:
    takes = {
        media.JSON: {
            "schema": _any(f"PredictRequest.{name}" for name in models),
            "examples": {name: {"value": example_request(m)} for name, m in models.items()},
        },
        media.ARROW: {"schema": _bytes("a column for each input column, or for each input")},
    }
    answers = {
        media.JSON: {"schema": _any(f"PredictResponse.{name}" for name in models)},
        media.ARROW: {"schema": _bytes("a column for each field, and the ids")},
    }
    for path, name in (("/v1/predict", ()), ("/v1/models/{name}/predict", (_name(models),))):
        yield _Operation(
            "post", path, "predict",
            "Predict rows" if name else "Predict rows with the only model that is served",
            answers, takes, fails=(*_BODY, 404, 422, 503, 504), parameters=name,
            description="Arrow streams are answered in Arrow, JSON in JSON, unless Accept asks "
            "for the other. In a stream alpha and outputs (JSON) and id are metadata of the "
            "schema.",
        )  # fmt: skip
    yield _Operation(
        "get", "/v1/models/{name}/example", "predict", "A request that works",
        {media.JSON: {"schema": _any(f"PredictRequest.{name}" for name in models)}},
        fails=(404, 503), parameters=(_name(models),),
    )  # fmt: skip


def _labels(models: Mapping[str, Model]) -> Iterable[_Operation]:
    of_model = {
        "name": "model", "in": "query", "description": "One model only",
        "schema": {"type": "string", "enum": sorted(models)},
    }  # fmt: skip
    taken: Json = {
        "schema": {"anyOf": [reference("Label"), {"type": "array", "items": reference("Label")}]}
    }
    if labelled := {n: {"value": example_label(m)} for n, m in models.items() if m.dense is None}:
        taken["examples"] = labelled
    takes: dict[str, Json] = {
        media.JSON: taken,
        media.NDJSON: {"schema": {"type": "string", "description": "a Label a line"}},
        media.PARQUET: {"schema": _bytes("columns id, label and model")},
        media.ARROW: {"schema": _bytes("columns id, label and model")},
    }
    answers = {media.JSON: {"schema": reference("LabelResults")}}
    yield _Operation(
        "post", "/v1/labels", "labels", "Say what was true", answers, takes,
        others={202: ("Some wait for their prediction", "LabelResults"),
                409: ("Another label is there already; it stays", "LabelResults")},
        fails=(*_BODY, 404, 422, 503),
    )  # fmt: skip
    yield _Operation(
        "get", "/v1/calibration", "labels", "What the ledger knows, exactly",
        {media.JSON: {"schema": reference("Calibration")}}, fails=(404, 503),
        parameters=(of_model,),
    )  # fmt: skip
    yield _Operation(
        "delete", "/v1/predictions/{id}", "labels", "Forget a prediction and its labels",
        {media.JSON: {"schema": reference("Forgotten")}}, fails=(404, 503),
        parameters=(_path("id", {"type": "string"}, "The row's id"), of_model),
    )  # fmt: skip


def _protocol(models: Mapping[str, Model]) -> Iterable[_Operation]:
    examples = {name: {"value": example_infer(m)} for name, m in models.items()}
    length = {
        "name": HEADER_LENGTH, "in": "header", "schema": {"type": "integer", "minimum": 0},
        "description": "Bytes of JSON at the start of the body; binary tensors follow it",
    }  # fmt: skip
    takes = {
        media.JSON: {"schema": reference("InferRequest"), "examples": examples},
        media.BINARY: {"schema": _bytes("JSON, then the tensors of inputs with binary_data_size")},
    }
    answers = {
        media.JSON: {"schema": reference("InferResponse")},
        media.BINARY: {"schema": _bytes("JSON, then the tensors of outputs with binary_data_size")},
    }
    of = (_name(models), _path("version", _versions(models), "The version that is served"))
    for between, chosen in (("", of[:1]), ("/versions/{version}", of)):
        path = f"/v2/models/{{name}}{between}"
        yield _Operation(
            "post", f"{path}/infer", "inference protocol", "Infer",
            answers, takes, fails=(*_BODY, 404, 422, 503, 504), parameters=(*chosen, length),
            headers={HEADER_LENGTH: {"schema": {"type": "integer"}, "description":
                                     "Bytes of JSON, where binary tensors follow"}},
        )  # fmt: skip
        for end, summary, schema in (
            ("", "Inputs, outputs, levels, classes, identity", "ModelMetadata"),
            ("/ready", "Ready to answer", "ModelReady"),
        ):
            yield _Operation(
                "get", f"{path}{end}", "inference protocol", summary,
                {media.JSON: {"schema": reference(schema)}}, fails=(404, 503), parameters=chosen,
            )  # fmt: skip
    for path, summary, schema, fails in (
        ("/v2", "The server, its models, and why others are not served", "ServerMetadata", (503,)),
        ("/v2/health/live", "Alive", "Live", ()),
        ("/v2/health/ready", "Ready to answer", "Ready", (503,)),
    ):
        yield _Operation("get", path, "inference protocol", summary,
                         {media.JSON: {"schema": reference(schema)}}, fails=fails)  # fmt: skip


def _rest(parts: Sequence[str]) -> Iterable[_Operation]:
    part = _path("part", {"type": "string", "enum": sorted(parts)}, "Its file")
    script, style = ({kind: _text()} for kind in ("text/javascript", "text/css"))
    for path, tag, summary, answers, fails, parameters in (
        ("/livez", "operation", "Alive", {media.JSON: {"schema": reference("Live")}}, (), ()),
        ("/readyz", "operation", "Ready", {media.JSON: {"schema": reference("Ready")}}, (503,), ()),
        ("/metrics", "operation", "Prometheus", {"text/plain": _text()}, (), ()),
        ("/openapi.json", "operation", "This document",
         {media.JSON: {"schema": {"type": "object"}}}, (503,), ()),
        ("/", "pages", "The live page", {_PAGES: _text()}, (), ()),
        ("/docs", "pages", "This document, to read", {_PAGES: _text()}, (), ()),
        ("/page.css", "pages", "Their style", style, (), ()),
        ("/page.js", "pages", "The live page's script", script, (), ()),
        ("/page/{part}", "pages", "Their parts", script | style, (404,), (part,)),
    ):  # fmt: skip
        yield _Operation("get", path, tag, summary, answers, fails=fails, parameters=parameters)


def _written(operation: _Operation, settings: Settings) -> Json:
    """An operation as the document has it."""
    closed = operation.path not in OPEN
    fails = sorted({*operation.fails, 500, *((401, 403) if closed else ())})
    error = reference("OipError" if is_oip(operation.path) else "Error")
    headers = {
        "X-Request-Id": {"schema": reference("Id"), "description": "The request's own, or new"}
    }
    responses: Json = {
        "200": {
            "description": "The answer",
            "content": dict(operation.answers),
            "headers": headers | dict(operation.headers),
        }
    }
    for status, (description, schema) in operation.others.items():
        content = {media.JSON: {"schema": reference(schema)}}
        responses[str(status)] = {
            "description": description, "content": content, "headers": headers
        }  # fmt: skip
    for status in fails:
        more = {"Retry-After": {"schema": {"type": "integer"}}} if status == 503 else {}
        responses[str(status)] = {
            "description": _REASONS[status],
            "content": {media.JSON: {"schema": error}},
            "headers": headers | more,
        }
    role = ROUTE_ROLES.get(operation.path, "admin")
    said = [operation.description, f"Needs a key of the role {role}." if closed else ""]
    written: Json = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": _identifier(operation),
        "responses": responses,
    }
    if settings.keys is None:
        said.pop()
    elif closed:
        written["security"] = [{"key": []}, {"header": []}, {"password": []}]
    if description := " ".join(filter(None, said)):
        written["description"] = description
    if operation.parameters:
        written["parameters"] = list(operation.parameters)
    if operation.takes:
        written["requestBody"] = {"required": True, "content": dict(operation.takes)}
    return written


def _identifier(operation: _Operation) -> str:
    words = operation.path.replace("{", "").replace("}", "").replace(".", "/").split("/")
    return "_".join((operation.method, *filter(None, words)))


def _name(models: Mapping[str, Model]) -> Json:
    return _path("name", {"type": "string", "enum": sorted(models)}, "A model that is served")


def _versions(models: Mapping[str, Model]) -> Json:
    return {"type": "string", "enum": sorted({m.version for m in models.values()})}


def _path(name: str, schema: Json, description: str) -> Json:
    return {
        "name": name, "in": "path", "required": True, "description": description, "schema": schema,
    }  # fmt: skip


def _any(names: Iterable[str]) -> Json:
    refs = [reference(name) for name in names]
    return refs[0] if len(refs) == 1 else {"anyOf": refs}


def _bytes(description: str) -> Json:
    return {"type": "string", "format": "binary", "description": description}


def _text() -> Json:
    return {"schema": {"type": "string"}}
