"""How many bytes the first line and the headers of a request may have: uvicorn takes any number.

It hands an application whole headers only, and until then keeps what comes (with h11 it has a bound
of its own, which is set here too). So they are counted where it reads. Its configuration, which an
application meets through ``receive`` of the lifespan, before the server listens, gets a class of
connections that counts; with another server there is nothing to reach, and nothing is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from starlette.types import Receive

from service.errors import error_body
from service.ids import new_id

_DRAIN = 16  # what follows a refusal is read on to this many times the bound


def bound_headers(
    receive: Receive,
    limit: int,
    *,
    met: Callable[[asyncio.Transport], None],
    refused: Callable[[], None],
) -> None:
    """Refuse requests whose first line and headers, or whose trailers, have more than ``limit``
    bytes: with 431 where the connection owes no other answer, else by closing it.

    ``receive`` is that of the lifespan. ``met`` hears of each new connection, ``refused`` of each
    refusal.
    """
    config = getattr(getattr(receive, "__self__", None), "config", None)
    base = getattr(config, "http_protocol_class", None)
    if config is None or not isinstance(base, type):
        return
    if hasattr(base, "on_headers_complete"):
        config.http_protocol_class = _counting(base, limit, met, refused)
    elif config.h11_max_incomplete_event_size is None:
        config.h11_max_incomplete_event_size = limit


def _counting(
    base: Any,
    limit: int,
    met: Callable[[asyncio.Transport], None],
    refused: Callable[[], None],
) -> type:
    """uvicorn's class of connections that are parsed by httptools, and counts."""

    class Counting(base):  # type: ignore[misc]  # known when the server starts
        _head = 0  # bytes of headers or trailers that have not come to their end
        _left: int | None = None  # bytes that are still read, and thrown away, after a refusal

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            # It makes the text of a line for each answer before it asks whether anybody reads it.
            if not self.access_logger.isEnabledFor(logging.INFO):
                self.access_log = False
            met(transport)

        def data_received(self, data: bytes) -> None:
            if self._left is None and self._head + len(data) <= limit:
                self._feed(data)
                return
            # No more is parsed at once than the headers may still have.
            while data and self._left is None and not self.transport.is_closing():
                end = limit - self._head
                self._feed(data[:end])
                data = data[end:]
                if self._head >= limit:
                    self._refuse()
            if self._left is not None:
                self._left -= len(data)
                if self._left < 0:
                    self.transport.abort()

        def _feed(self, data: bytes) -> None:
            cycle = self.cycle  # the latest request whose headers are whole
            receiving = cycle is not None and cycle.more_body and not cycle.response_complete
            body = len(cycle.body) if receiving else 0
            super().data_received(data)
            if self.cycle is not cycle:
                unfinished = False  # what began behind them is counted from the next bytes on
            elif receiving:  # trailers bring no more of the body
                unfinished = cycle.more_body and len(cycle.body) == body
            else:
                unfinished = self.scope is not None and "method" not in self.scope
            self._head = self._head + len(data) if unfinished else 0

        def _refuse(self) -> None:
            refused()
            self._left = _DRAIN * limit
            if self.cycle is not None and not self.cycle.response_complete:
                self.transport.abort()  # another answer may have begun
                return
            # A client that is still sending would meet a reset connection instead of the reason:
            # so it is read on, and closes the connection itself.
            path = self.url.decode("latin-1").partition("?")[0]
            self.transport.write(_answer(path, limit))
            self.headers.clear()

    return Counting


def _answer(path: str, limit: int) -> bytes:
    request_id = new_id()
    message = f"the first line and headers are larger than {limit} bytes"
    body = error_body(path, "headers_too_large", message, request_id)
    head = (
        "HTTP/1.1 431 Request Header Fields Too Large\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        "connection: close\r\n"
        f"x-request-id: {request_id}\r\n"
        "x-content-type-options: nosniff\r\n\r\n"
    )
    return head.encode() + body
