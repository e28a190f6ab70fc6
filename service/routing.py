"""From a request to its handler, and from what that returns to the server."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Route, Router
from starlette.types import Receive, Scope, Send

_MOST_KNOWN = 256
_LONGEST_KNOWN = 256  # characters of a path


@dataclass(slots=True)
class Reply:
    """A whole answer; ``headers`` are those beside its type and length, names in lower case."""

    body: bytes
    media_type: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Coroutine[Any, Any, Reply]]


class Direct:
    """A handler as an ASGI application: what it raises goes to the guard as it is."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = await self._handler(Request(scope, receive, send))
        headers = [
            (b"content-length", str(len(reply.body)).encode()),
            (b"content-type", reply.media_type.encode()),
        ]
        headers += [(k.encode(), v.encode()) for k, v in reply.headers.items()]
        await send(
            {"type": "http.response.start", "status": reply.status, "headers": headers},
        )
        await send({"type": "http.response.body", "body": reply.body})


class Routes(Router):
    """Starlette's router, which remembers where the latest paths led."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._known: dict[tuple[str, str, str], tuple[BaseRoute, Scope]] = {}

    def find(self, scope: Scope) -> BaseRoute | None:
        """The route of an HTTP request, None where no path or method is like its own."""
        found = self._find(scope)
        return None if found is None else found[0]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the route that matches; as Starlette does where none does."""
        found = self._find(scope) if scope["type"] == "http" else None
        if found is None:
            await super().__call__(scope, receive, send)
            return
        route, matched = found
        scope["router"], scope["route"] = self, route
        scope.update(matched)
        # The method has been looked at: it is part of what is known.
        handle = route.app if isinstance(route, Route) else route.handle
        await handle(scope, receive, send)

    def _find(self, scope: Scope) -> tuple[BaseRoute, Scope] | None:
        """The route that matches, and what it adds to the scope."""
        key = scope["method"], scope["path"], scope.get("root_path", "")
        found = self._known.get(key)
        if found is None:
            found = next(
                (
                    (route, added)
                    for route in self.routes
                    for match, added in [route.matches(scope)]
                    if match is Match.FULL
                ),
                None,
            )
            if found is not None and len(scope["path"]) <= _LONGEST_KNOWN:
                if len(self._known) >= _MOST_KNOWN:  # clients choose what they ask for
                    self._known.clear()
                self._known[key] = found
        return found
