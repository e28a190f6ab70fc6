"""Every route of the service: each translates a request for the core, and its answer back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from posthoc.contract import Array
from posthoc.runtime import provider_name
from service import feedback, friendly, instruments, media, parsing, protocol
from service.core import Core, most_rows
from service.errors import ServiceError, overloaded, shorten
from service.examples import example_request
from service.ids import valid_id
from service.later import Later
from service.ledger import LedgerError
from service.models import Model
from service.openapi import document
from service.routing import Direct, Handler, Reply

T = TypeVar("T")
_HEADER_LENGTH = protocol.HEADER_LENGTH.lower().encode()
_PAGES = {
    "index.html": "text/html; charset=utf-8",
    "docs.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
_PARTS = (
    *("api.js", "charts.js", "docs.css", "docs.js", "dom.js", "figures.css"),
    *("metrics.js", "panel.js", "traffic.js", "try.js"),
)


def service_routes(running: Callable[[], Core], later: Later) -> list[BaseRoute]:
    """The routes over the core that ``running`` gives, or raises ServiceError 503 for; ``later``
    holds what the metrics have not been told yet.

    The busiest come first: they are tried in order.
    """

    async def infer(request: Request) -> Reply:
        core, model = _find(running(), request)
        body = request.scope["hedged.body"]
        header = _header_length(request)
        specs = model.predictor.inputs
        wanted = await core.parse(
            body,
            _most_values(core, model),
            lambda: protocol.parse_infer(body, header, specs, core.nulls),
            json=protocol.header_length(header, len(body)),
        )
        binary = wanted.outputs
        if binary is None:
            binary = {spec.name: wanted.binary for spec in model.outputs}
        _note_rows(request, wanted.inputs)
        answer = await core.predict(
            model,
            wanted.inputs,
            outputs=tuple(binary),
            text=tuple([name for name, raw in binary.items() if not raw]),
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
            return Reply(body, media.JSON)
        return Reply(body, media.BINARY, headers={protocol.HEADER_LENGTH.lower(): str(head)})

    async def predict(request: Request) -> Reply:
        core, model = _find(running(), request)
        body = request.scope["hedged.body"]
        given = media.media_type(request.headers["content-type"])
        sent = media.ARROW if given == media.ARROW else media.JSON
        asked = media.preferred(
            request.headers.getlist("accept"), (media.JSON, media.ARROW), default=sent
        )
        wanted = await (_from_arrow if sent == media.ARROW else _from_json)(core, model, body)
        options = wanted.options
        outputs = options.outputs or friendly.default_outputs(model)
        _note_rows(request, wanted.inputs)
        answer = await core.predict(
            model,
            wanted.inputs,
            outputs=outputs,
            text=() if asked == media.ARROW else outputs,
            alpha=options.alpha,
            id=options.id,
            ids=wanted.ids,
            reserve=request.scope["hedged.reserve"],
            disconnected=_watch(request),
        )
        encode = friendly.encode_predict
        if asked == media.ARROW:
            encode = (await _arrow()).encode_predict
        encoded = await core.parse.beside(answer.nbytes, lambda: encode(answer))
        return Reply(encoded, asked)

    async def example(request: Request) -> Reply:
        _, model = _find(running(), request)
        return _json(example_request(model))

    async def labels(request: Request) -> Reply:
        core = running()
        media_type = media.media_type(request.headers["content-type"])
        body, limit = request.scope["hedged.body"], core.settings.max_labels
        width = max(1 if m.task == "classification" else m.width for m in core.models.values())
        items, single = await core.parse(
            body,
            lambda: parsing.most_labels(limit, width),
            lambda: feedback.parse_labels(
                body,
                media_type,
                core.known,
                limit,
                core.settings.max_body_bytes,
                dense=feedback.dense_models(core.models),
            ),
            # A table bounds itself, and has commas anywhere.
            json=0 if media_type in feedback.TABLES else None,
        )
        outcomes = await _in_ledger(
            asyncio.to_thread(feedback.keep, items, core.models, core.ledger)
        )
        if single and outcomes[0] == "invalid":
            raise feedback.unfit(items[0])
        return _json(feedback.results(items, outcomes), feedback.status(outcomes, single))

    async def calibration(request: Request) -> Reply:
        core = running()
        name = request.query_params.get("model")
        model = None if name is None else core.known(name)
        return _json(await _in_ledger(core.calibration.get(model)))

    async def forget(request: Request) -> Reply:
        core = running()
        id = request.path_params["id"]
        name = request.query_params.get("model")
        model = None if name is None else core.known(name)
        known = valid_id(id)
        core.later.flush()
        if not known or not await _in_ledger(asyncio.to_thread(core.ledger.forget, id, model)):
            raise ServiceError(404, "unknown_prediction", f"no prediction {shorten(id)!r}")
        core.calibration.forget()
        return _json({"id": id, "forgotten": True})

    async def server_metadata(_: Request) -> Reply:
        core = running()
        return _json(
            {
                "name": "hedged",
                "version": _version(),
                "extensions": list(protocol.EXTENSIONS),
                "models": sorted(core.models),
                "unavailable": core.unavailable,
            }
        )

    async def model_metadata(request: Request) -> Reply:
        core, model = _find(running(), request)
        return _json(describe(model, core.swap_errors.get(model.name)))

    async def model_ready(request: Request) -> Reply:
        _refuse_draining(request)
        core, model = _find(running(), request)
        return _json({"name": model.name, "ready": core.ready})

    async def live(_: Request) -> Reply:
        return _json({"live": True})

    async def ready(request: Request) -> Reply:
        """Whether to send requests here: 200 while any model is served, with the names of those
        that are not.

        What is broken under the root is so for every replica of it. A 503 for one of three models
        would take all replicas out of service, and with them the two that answer; each model says
        of itself under ``/v2/models/NAME/ready``. The Open Inference Protocol would have all models
        ready here, and a readiness probe built on this path: both cannot be.
        """
        _refuse_draining(request)
        core = running()
        return _json({"ready": core.ready, "unavailable": sorted(core.unavailable)})

    async def metrics(_: Request) -> Reply:
        later.flush()
        text = await asyncio.to_thread(instruments.render)
        return Reply(text, instruments.CONTENT_TYPE)

    async def described(_: Request) -> Reply:
        core = running()
        return _json(document(core.models, core.settings, version=_version(), parts=_PARTS))

    parts = {name: _page(name) for name in _PARTS}

    async def part(request: Request) -> Reply:
        name = request.path_params["part"]
        if name not in parts:
            raise ServiceError(404, "not_found", f"the live page has no part {shorten(name)!r}")
        return await parts[name](request)

    def route(path: str, handler: Handler, method: str = "GET") -> Route:
        return Route(path, Direct(handler), methods=[method])

    return [
        route("/v2/models/{name}/infer", infer, "POST"),
        route("/v2/models/{name}/versions/{version}/infer", infer, "POST"),
        route("/v1/predict", predict, "POST"),
        route("/v1/models/{name}/predict", predict, "POST"),
        route("/v1/models/{name}/example", example),
        route("/v1/labels", labels, "POST"),
        route("/v1/calibration", calibration),
        route("/v1/predictions/{id}", forget, "DELETE"),
        route("/v2", server_metadata),
        route("/v2/health/live", live),
        route("/v2/health/ready", ready),
        route("/v2/models/{name}", model_metadata),
        route("/v2/models/{name}/ready", model_ready),
        route("/v2/models/{name}/versions/{version}", model_metadata),
        route("/v2/models/{name}/versions/{version}/ready", model_ready),
        route("/livez", live),
        route("/readyz", ready),
        route("/metrics", metrics),
        route("/openapi.json", described),
        route("/", _page("index.html")),
        route("/docs", _page("docs.html")),
        route("/page.css", _page("page.css")),
        route("/page.js", _page("page.js")),
        route("/page/{part}", part),
    ]


def describe(model: Model, swap_error: str | None = None) -> dict[str, Any]:
    """A model's metadata: the protocol's own keys, and under ``parameters`` what we add.

    ``swap_error`` says why it is still this version, where another should be served.
    """
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
            "provider": provider_name(model.predictor.session),
            "prediction": manifest.prediction,
            "conformal": manifest.conformal.method,
            "levels": list(model.levels.values()),
            "ood_alpha": None if manifest.ood is None else manifest.ood.alpha,
            "max_error": None if manifest.abstain is None else manifest.abstain.max_error,
            "columns": friendly.input_columns(manifest.mapping),
            "classes": None if model.classes is None else list(model.classes),
            "dense": None if model.dense is None else model.dense.model_dump(),
            "swap_error": swap_error,
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
    model = core.model(params.get("name"), params.get("version"))
    request.scope["hedged.facts"]["model"] = model.name
    return core, model


def _header_length(request: Request) -> str | None:
    sent: bytes | None = request.scope["hedged.headers"].get(_HEADER_LENGTH)
    return None if sent is None else sent.decode("latin-1")


def _refuse_draining(request: Request) -> None:
    if request.scope.get("hedged.draining"):
        raise overloaded("the server is stopping; use another", "draining")


def _note_rows(request: Request, inputs: Mapping[str, Array]) -> None:
    """For the log."""
    request.scope["hedged.facts"]["rows"] = most_rows(inputs)


async def _from_json(core: Core, model: Model, body: bytes) -> friendly.PredictRequest:
    return await core.parse(
        body, _most_values(core, model), lambda: friendly.parse_predict(body, model, core.nulls)
    )


def _most_values(core: Core, model: Model) -> Callable[[], int]:
    settings, specs = core.settings, model.predictor.inputs
    return lambda: parsing.most_values(specs, settings.max_rows, settings.max_body_bytes)


async def _from_arrow(core: Core, model: Model, body: bytes) -> friendly.PredictRequest:
    arrow, settings = await _arrow(), core.settings
    rows, values = settings.max_rows, settings.max_body_bytes
    # Beside the loop whatever its size: a short header may describe very much.
    size = max(len(body), parsing.LARGE + 1)
    return await core.parse.beside(size, lambda: arrow.parse_predict(body, model, rows, values))


async def _arrow() -> Any:
    """The module that reads and writes Arrow, loaded on first use and beside the loop."""
    return await asyncio.to_thread(import_module, "service.arrow")


def _watch(request: Request) -> Callable[[], Coroutine[Any, Any, None]]:
    """What returns once the client has gone."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return disconnected


def _json(value: Any, status: int = 200) -> Reply:
    body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Reply(body, media.JSON, status)


def _page(name: str) -> Handler:
    body = files("service.page").joinpath(name).read_bytes()

    async def page(_: Request) -> Reply:
        kind = _PAGES.get(name, _PAGES["page.css" if name.endswith(".css") else "page.js"])
        return Reply(body, kind, headers={"cache-control": "no-cache"})

    return page
