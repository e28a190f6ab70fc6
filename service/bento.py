"""The BentoML service: our application outside BentoML's middleware, and one thin native API.

``bentoml serve service.bento:svc``, ``bentoml build`` and bentofile.yaml name ``svc``. The hook is
the ``service_class`` argument of ``bentoml.service``; a canary test notices when it stops working.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import bentoml
import orjson
from bentoml.exceptions import BentoMLException
from pydantic import ValidationError

from calibration.signing import load_signed
from posthoc.contract import HedgedError
from service import friendly, logs
from service.app import Application
from service.bundles import check_place, is_bundle, live_version, model_folders, none_of
from service.core import Core
from service.drain import watched
from service.errors import ServiceError
from service.settings import load_settings

_settings = load_settings()


class WithoutInputs(logging.Filter):
    """Takes the traceback from what BentoML logs of a body that it refuses: it quotes the body."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let the record pass, without what was sent."""
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, ValidationError):
            record.msg, record.args = f"{record.getMessage()}: {error.error_count()} errors", ()
            record.exc_info = record.exc_text = None
        return True


class HedgedService(bentoml.Service[Any]):  # type: ignore[misc]  # bentoml gives no types
    """A BentoML service whose ASGI application is ours, with BentoML's own few routes inside."""

    def to_asgi(self, is_main: bool = True) -> Application:
        """Our application; BentoML's answers its native API and describes it."""
        logs.setup()
        logging.getLogger("bentoml._internal.server.http_app").addFilter(WithoutInputs())
        inner = super().to_asgi(is_main=is_main)
        self.application = Application(
            _settings,
            beside=inner,
            beside_routes=[
                ("/schema.json", ["GET"]),
                ("/docs.json", ["GET"]),
                *((method.route, ["POST"]) for method in self.apis.values()),
            ],
        )
        return self.application

    def core(self) -> Core:
        """The running core. Raises ServiceError 503 before it is ready."""
        return self.application.running()


@bentoml.service(
    name="hedged",
    service_class=HedgedService,
    workers=_settings.workers,
    traffic={"timeout": _settings.request_timeout_s},
    metrics={"enabled": False},  # its series take the raw path as a label
    logging={"access": {"enabled": False}},
)
class Hedged:
    """Predictions with honest error bars."""

    bento_service: HedgedService

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def check() -> None:
        """Once, before any worker starts: where nothing can be served, say so while somebody is
        looking. Of one among several the workers say it."""
        with watched():
            path, problems = _settings.bundle_path, dict[str, Exception]()
            if is_bundle(path):
                load_signed(path, _settings.signed_by)
                return
            for name, folder in model_folders(path).items():
                try:
                    live = folder / live_version(folder)
                    check_place(name, live, load_signed(live, _settings.signed_by).manifest)
                    return
                except HedgedError as e:
                    problems[name] = e
            raise none_of(path, problems)

    @bentoml.api  # type: ignore[untyped-decorator]
    async def predict(
        self, rows: list[dict[str, Any]], alpha: float | None = None, model: str | None = None
    ) -> list[dict[str, Any]]:
        """One object per row, as ``POST /v1/predict`` gives them under ``predictions``."""
        try:
            core = self.bento_service.core()
            served = core.model(model)
            wanted = friendly.read_predict({"rows": rows, "alpha": alpha}, served, core.nulls)
            names = friendly.default_outputs(served)
            answer = await core.predict(
                served, wanted.inputs, outputs=names, text=names, alpha=wanted.options.alpha
            )
        except ServiceError as e:
            raise BentoMLException(e.message, error_code=HTTPStatus(e.status)) from None
        plain: list[dict[str, Any]] = orjson.loads(friendly.encode_predict(answer))["predictions"]
        return plain


svc = Hedged
