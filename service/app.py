"""The application: routes that translate, around the core, inside the guard.

The same object runs under BentoML (service.bento), under plain uvicorn
(``uvicorn --factory service.app:create_app``) and in process.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from service import instruments
from service.core import Core
from service.errors import ServiceError
from service.guard import Guard
from service.joiner import EXPIRE_AFTER_S, Joiner
from service.ledger import Ledger, LedgerError
from service.models import Model, load_models
from service.routes import service_routes
from service.rows import MAX_STORED_CLASSES
from service.settings import Settings, load_settings

_log = logging.getLogger("hedged.app")


class Application:
    """The guarded ASGI application of one server process; ``core`` exists while it runs.

    ``beside`` is an application that answers ``beside_routes`` (path, methods) within the same
    guard, and whose lifespan runs inside ours.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        beside: Starlette | None = None,
        beside_routes: Sequence[tuple[str, list[str]]] = (),
    ) -> None:
        self.settings = settings
        self.core: Core | None = None
        self._beside = beside
        routes = [
            *service_routes(self.running),
            *(Route(path, beside, methods=methods) for path, methods in beside_routes if beside),
        ]
        # A bare router: every failure reaches the guard, which alone shapes errors.
        self.guarded: ASGIApp = Guard(
            Router(routes, redirect_slashes=False, lifespan=self._lifespan),
            max_body_bytes=settings.max_body_bytes,
            max_body_bytes_total=settings.max_body_bytes_total,
            max_answer_bytes_total=settings.max_answer_bytes_total,
            body_timeout=settings.request_timeout_s,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # without it the router would answer 404 and 405 by itself
        await self.guarded(scope, receive, send)

    def running(self) -> Core:
        """The core. Raises ServiceError 503 before it can answer and after the end."""
        if self.core is None or not self.core.ready:
            raise ServiceError(503, "not_ready", "no model is ready", headers={"Retry-After": "1"})
        return self.core

    @asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncIterator[None]:
        """Load and check every model, open the ledger, start joining labels; undo it at the end."""
        settings = self.settings
        models = load_models(settings.bundle_path, device=settings.device, threads=settings.threads)
        async with AsyncExitStack() as stack:
            ledger = Ledger.open(settings.ledger_url, spool_dir=settings.data_dir / "spool")
            stack.callback(ledger.close)
            for model in models.values():
                _announce(model, ledger)
            _start_earlier(models, ledger)
            joiner = Joiner(ledger)
            joiner.start()
            stack.callback(joiner.stop)
            self.core = Core(settings, models, ledger)
            stack.push_async_callback(self._stop)
            if self._beside is not None:
                await stack.enter_async_context(self._beside.router.lifespan_context(self._beside))
            gc.freeze()  # what was loaded stays: the collector need not walk it on a request
            self.core.ready = True
            yield

    async def _stop(self) -> None:
        if self.core is not None:
            core, self.core = self.core, None
            await core.close()


def create_app(settings: Settings | None = None) -> Application:
    """The application over ``settings`` (default: the environment's)."""
    return Application(load_settings() if settings is None else settings)


def _announce(model: Model, ledger: Ledger) -> None:
    """Start the model's series at 0 and tell the ledger how to read its labels."""
    manifest, levels = model.predictor.manifest, list(model.levels.values())
    instruments.register_model(
        model.name,
        model.version,
        model.identity,
        manifest.module.name,
        levels,
        model.task,
        scored=model.task == "classification" and model.width <= MAX_STORED_CLASSES,
        labels=model.dense is None,
    )
    ledger.register(
        model.name,
        model.version,
        model.identity,
        task=model.task,
        width=model.width,
        classes=model.classes,
        levels=levels,
    )


def _start_earlier(models: Mapping[str, Model], ledger: Ledger) -> None:
    """Start the series of versions that are served no longer and may still get labels."""
    try:
        found = ledger.sources(EXPIRE_AFTER_S)
    except LedgerError as e:  # the service starts without its store, too
        _log.warning("versions served earlier are not known: %s", e)
        return
    served = {(model.name, model.version) for model in models.values()}
    for s in found:
        if (s.model, s.version) not in served:
            scored = s.width is not None and s.width <= MAX_STORED_CLASSES
            instruments.start_series(s.model, s.version, s.levels or (), s.task, scored=scored)
