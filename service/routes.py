"""Every route of the service: each translates a request for the core, and its answer back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from service import feedback, friendly, instruments, parsing, protocol
from service.core import Core
from service.errors import ServiceError, overloaded, shorten
from service.ids import valid_id
from service.ledger import LedgerError
from service.models import Model

T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
_PAGES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}


def service_routes(running: Callable[[], Core]) -> list[BaseRoute]:
    """The routes over the core that ``running`` gives, or raises ServiceError 503 for.

    The busiest come first: they are tried in order.
    """

    async def infer(request: Request) -> Response:
        core, model = _find(running(), request)
        body = request.scope["hedged.body"]
        header = request.headers.get(protocol.HEADER_LENGTH)
        specs = model.predictor.inputs
        wanted = await core.parse(
            body,
            parsing.most_values(specs, core.settings.max_rows, core.settings.max_body_bytes),
            lambda: protocol.parse_infer(body, header, specs),
            json=protocol.header_length(header, len(body)),
        )
        binary = wanted.outputs
        if binary is None:
            binary = {spec.name: wanted.binary for spec in model.outputs}
        answer = await core.predict(
            model,
            wanted.inputs,
            outputs=list(binary),
            text=[name for name, raw in binary.items() if not raw],
            alpha=wanted.alpha,
            id=wanted.id,
            reserve=request.scope["hedged.reserve"],
            disconnected=_watch(request),
        )
        body, head = await core.parse.beside(
            answer.nbytes,
            lambda: protocol.encode_infer(
                model.name, model.version, answer.id, answer.fields, binary
            ),
        )
        if head is None:
            return Response(body, media_type="application/json")
        return Response(
            body,
            media_type="application/octet-stream",
            headers={protocol.HEADER_LENGTH: str(head)},
        )

    async def predict(request: Request) -> Response:
        core, model = _find(running(), request)
        body = request.scope["hedged.body"]
        wanted = await core.parse(
            body,
            parsing.most_values(
                model.predictor.inputs, core.settings.max_rows, core.settings.max_body_bytes
            ),
            lambda: friendly.parse_predict(body, model),
        )
        outputs = wanted.outputs or friendly.default_outputs(model)
        answer = await core.predict(
            model,
            wanted.inputs,
            outputs=outputs,
            text=outputs,
            alpha=wanted.alpha,
            id=wanted.id,
            ids=wanted.ids,
            reserve=request.scope["hedged.reserve"],
            disconnected=_watch(request),
        )
        encoded = await core.parse.beside(answer.nbytes, lambda: friendly.encode_predict(answer))
        return Response(encoded, media_type="application/json")

    async def labels(request: Request) -> Response:
        core = running()
        media_type = request.headers["content-type"].split(";", 1)[0].strip().lower()
        body, limit = request.scope["hedged.body"], core.settings.max_labels
        width = max(1 if m.task == "classification" else m.width for m in core.models.values())
        items, single = await core.parse(
            body,
            parsing.most_labels(limit, width),
            lambda: feedback.parse_labels(body, media_type, core.model, limit),
        )
        outcomes = await _in_ledger(asyncio.to_thread(core.ledger.add_labels, items))
        if single and outcomes[0] == "invalid":
            raise feedback.unfit(items[0])
        return _json(feedback.results(items, outcomes), feedback.status(outcomes, single))

    async def calibration(request: Request) -> Response:
        core = running()
        name = request.query_params.get("model")
        model = None if name is None else core.model(name).name
        return _json(await _in_ledger(core.calibration.get(model)))

    async def forget(request: Request) -> Response:
        core = running()
        id = request.path_params["id"]
        name = request.query_params.get("model")
        model = None if name is None else core.model(name).name
        known = valid_id(id)
        if not known or not await _in_ledger(asyncio.to_thread(core.ledger.forget, id, model)):
            raise ServiceError(404, "unknown_prediction", f"no prediction {shorten(id)!r}")
        core.calibration.forget()
        return _json({"id": id, "forgotten": True})

    async def server_metadata(_: Request) -> Response:
        return _json(
            {
                "name": "hedged",
                "version": _version(),
                "extensions": list(protocol.EXTENSIONS),
                "models": sorted(running().models),
            }
        )

    async def model_metadata(request: Request) -> Response:
        _, model = _find(running(), request)
        return _json(describe(model))

    async def model_ready(request: Request) -> Response:
        core, model = _find(running(), request)
        return _json({"name": model.name, "ready": core.ready})

    async def live(_: Request) -> Response:
        return _json({"live": True})

    async def ready(_: Request) -> Response:
        return _json({"ready": running().ready})

    async def metrics(_: Request) -> Response:
        text = await asyncio.to_thread(instruments.render)
        return Response(text, headers={"content-type": instruments.CONTENT_TYPE})

    return [
        Route("/v2/models/{name}/infer", infer, methods=["POST"]),
        Route("/v2/models/{name}/versions/{version}/infer", infer, methods=["POST"]),
        Route("/v1/predict", predict, methods=["POST"]),
        Route("/v1/models/{name}/predict", predict, methods=["POST"]),
        Route("/v1/labels", labels, methods=["POST"]),
        Route("/v1/calibration", calibration),
        Route("/v1/predictions/{id}", forget, methods=["DELETE"]),
        Route("/v2", server_metadata),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/models/{name}", model_metadata),
        Route("/v2/models/{name}/ready", model_ready),
        Route("/v2/models/{name}/versions/{version}", model_metadata),
        Route("/v2/models/{name}/versions/{version}/ready", model_ready),
        Route("/livez", live),
        Route("/readyz", ready),
        Route("/metrics", metrics),
        Route("/", _page("index.html")),
        Route("/page.css", _page("page.css")),
        Route("/page.js", _page("page.js")),
    ]


def describe(model: Model) -> dict[str, Any]:
    """A model's metadata: the protocol's own keys, and under ``parameters`` what we add."""
    manifest = model.predictor.manifest
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": "onnx_onnxv1",
        "inputs": [protocol.tensor_metadata(spec) for spec in manifest.inputs],
        "outputs": [protocol.tensor_metadata(spec) for spec in model.outputs],
        "parameters": {
            "identity": model.identity,
            "task": model.task,
            "method": manifest.module.name,
            "prediction": manifest.prediction,
            "conformal": manifest.conformal.method,
            "levels": list(model.levels.values()),
            "columns": friendly.input_columns(manifest.mapping),
            "classes": None if model.classes is None else list(model.classes),
            "dense": None if model.dense is None else model.dense.model_dump(),
        },
    }


def _version() -> str:
    try:
        return version("hedged")
    except PackageNotFoundError:  # inside a bento the sources lie on the path, not installed
        return "unknown"


async def _in_ledger(answer: Awaitable[T]) -> T:
    """What a thread asks the ledger: it may wait for a disk or a server."""
    try:
        return await answer
    except LedgerError as e:
        raise overloaded(str(e)) from None


def _find(core: Core, request: Request) -> tuple[Core, Model]:
    params = request.path_params
    return core, core.model(params.get("name"), params.get("version"))


def _watch(request: Request) -> Callable[[], Coroutine[Any, Any, None]]:
    """What returns once the client has gone."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return disconnected


def _json(value: Any, status: int = 200) -> Response:
    body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, media_type="application/json")


def _page(name: str) -> Handler:
    body = files("service.page").joinpath(name).read_bytes()

    async def page(_: Request) -> Response:
        return Response(body, headers={"content-type": _PAGES[name], "cache-control": "no-cache"})

    return page
