"""Connections on which a client lets the server wait: uvicorn would wait for ever.

uvicorn has a timeout between two requests, and none while the first line and headers of a request
come, or while a connection that it closes still holds bytes that the client does not take. ASGI
knows no connections, so they are reached through the ``send`` of a request; with another server
than uvicorn there is nothing to reach, and nothing is done.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from starlette.types import Send

_LOOKS = 4  # within one timeout


def transport_of(send: Send) -> asyncio.Transport | None:
    """The connection behind an ASGI ``send`` of uvicorn's; None of others."""
    found = getattr(getattr(send, "__self__", None), "transport", None)
    return found if callable(getattr(found, "abort", None)) else None


class Connections:
    """Drops connections that make the server wait for ``timeout`` seconds.

    It learns of the server with the first connection or request, and of all others through it.
    """

    def __init__(self, timeout: float, dropped: Callable[[], None] = lambda: None) -> None:
        self._timeout = timeout
        self._dropped = dropped
        self._all: set[Any] | None = None  # uvicorn's own
        self._waits: dict[Any, tuple[object, float]] = {}  # what for, and since when
        self._task: asyncio.Task[None] | None = None

    def learn(self, transport: asyncio.Transport | None) -> None:
        """Watch the server that a connection belongs to, from the first call on."""
        if self._task is None and transport is not None:
            self._all = getattr(transport.get_protocol(), "connections", None)
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._timeout / _LOOKS)
            self._look(asyncio.get_running_loop().time())

    def _look(self, now: float) -> None:
        waits = {}
        for one in tuple(self._all or ()):
            if (reason := _waits_for(one)) is None:
                continue
            known, since = self._waits.get(one, (None, now))
            since = since if known == reason else now
            if now - since < self._timeout:
                waits[one] = reason, since
            else:
                self._dropped()
                one.transport.abort()
        self._waits = waits


def _waits_for(protocol: Any) -> object:
    """What a connection lets the server wait for; None while it is the server's turn."""
    if not hasattr(protocol, "cycle"):  # a websocket, which the guard closes
        return None
    cycle = protocol.cycle
    if protocol.transport.is_closing():
        return "what was sent is taken"
    if cycle is not None and not cycle.response_complete:
        return None  # a request that the guard bounds
    if protocol.timeout_keep_alive_task is not None:
        return None  # between two requests, where uvicorn has a timeout
    return "headers after", id(cycle)
