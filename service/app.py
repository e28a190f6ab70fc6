"""The application: routes that translate, around the core, inside the guard.

The same object runs under BentoML (service.bento), under plain uvicorn
(``uvicorn --factory service.app:create_app``) and in process.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service import instruments, logs
from service.access import Access
from service.bundles import is_bundle
from service.connections import Connections, transport_of
from service.core import Core
from service.drain import UNSERVED, Drain, Lifeline
from service.errors import ServiceError
from service.guard import Guard
from service.headers import bound_headers
from service.joiner import EXPIRE_AFTER_S, Joiner
from service.keys import Keys
from service.later import Later
from service.ledger import Ledger, LedgerError
from service.live import Found, Watcher, announce, explain, open_models
from service.models import Model
from service.routes import service_routes
from service.routing import Routes
from service.rows import MAX_STORED_CLASSES
from service.settings import Settings, load_settings

# New objects between two looks for cycles, of which requests make none. Python's 700 come with
# every few requests, and looking among those of 64 that are being answered cost a fifth of them.
_GARBAGE = 10_000
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
        self._later = Later()
        self._beside = beside
        routes = [
            *service_routes(self.running, self._later),
            *(Route(path, beside, methods=methods) for path, methods in beside_routes if beside),
        ]
        router = Routes(routes, redirect_slashes=False, lifespan=lambda _: self.lifespan())
        # A bare router: every failure reaches the guard, which alone shapes errors.
        self.guarded: ASGIApp = Guard(
            router,
            max_body_bytes=settings.max_body_bytes,
            max_body_bytes_total=settings.max_body_bytes_total,
            max_answer_bytes_total=settings.max_answer_bytes_total,
            body_timeout=settings.request_timeout_s,
            send_timeout=settings.send_timeout_s,
            access=Access(router.find, _keys(settings), open=settings.open).check,
            log=logs.RequestLog(settings.log_requests, settings.log_slow_s),
            later=self._later,
        )
        self._connections = Connections(
            max(settings.request_timeout_s, settings.send_timeout_s),
            lambda: instruments.count_rejected("client_silent"),
        )
        self._lifeline = Lifeline.inherited()
        self.drained: ASGIApp = Drain(self.guarded, self._lifeline)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # without it the router would answer 404 and 405 by itself
        if scope["type"] == "http":
            scope["hedged.transport"] = transport_of(send)
            self._connections.learn(scope["hedged.transport"])
        elif scope["type"] == "lifespan":
            bound_headers(
                receive,
                self.settings.max_header_bytes,
                met=self._connections.learn,
                refused=lambda: instruments.count_rejected("headers_too_large"),
            )
        await self.drained(scope, receive, send)

    def running(self) -> Core:
        """The core. Raises ServiceError 503 before it can answer and after the end."""
        if self.core is None or not self.core.ready:
            raise ServiceError(503, "not_ready", "no model is ready", headers={"Retry-After": "1"})
        return self.core

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Load and check every model, open the ledger, start joining labels and watching for other
        versions; undo it at the end. A server enters it by ASGI's protocol."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._connections.stop)
            self.core, seen = self._begin(stack)
            stack.push_async_callback(self._stop)
            if self._beside is not None:
                await stack.enter_async_context(self._beside.router.lifespan_context(self._beside))
            if not is_bundle(self.settings.bundle_path):
                watcher = Watcher(self.core, seen)
                watcher.start()
                stack.push_async_callback(asyncio.to_thread, watcher.stop)
            gc.freeze()  # what was loaded stays: the collector need not walk it on a request
            gc.set_threshold(_GARBAGE)
            self.core.ready = True
            yield

    def _begin(self, stack: AsyncExitStack) -> tuple[Core, Mapping[str, Found]]:
        # Not in the lifespan, whose variables would keep a model that is served no longer.
        settings = self.settings
        opened = open_models(
            settings.bundle_path,
            device=settings.device,
            threads=settings.model_threads,
            signed_by=settings.signed_by,
        )
        models = opened.models
        ledger = Ledger.open(settings.ledger_url, spool_dir=settings.data_dir / "spool")
        stack.callback(ledger.close)
        for model in models.values():
            announce(model, ledger)
        _start_earlier(models, ledger)
        joiner = Joiner(ledger, retain_s=settings.retain_s)
        joiner.start()
        stack.callback(joiner.stop)
        core = Core(settings, models, ledger, self._later)
        for name, problem in opened.problems.items():
            explain(core, name, problem)
            if self._lifeline is not None:
                self._lifeline.report(UNSERVED, f"{name}: {problem}")
        return core, opened.seen

    async def _stop(self) -> None:
        if self.core is not None:
            core, self.core = self.core, None
            await core.close()


def create_app(settings: Settings | None = None) -> Application:
    """The application over ``settings``. Default: the environment's, with its logs as JSON."""
    if settings is None:
        settings = load_settings()
        logs.setup()
    return Application(settings)


def _keys(settings: Settings) -> Keys | None:
    if settings.keys is None:
        return None
    return Keys(settings.keys, failed=instruments.count_keys_error)


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
