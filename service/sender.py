"""Sends an answer as fast as its client takes it, and gives up on one that does not."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Send

from service.errors import ServiceError
from service.within import within

PIECE = 256 << 10  # bytes of an answer that are handed to the server at once


class Sender:
    """The ``send`` of one response, bounded: all of it is taken within ``timeout`` seconds of its
    start, or ``transport``, the connection, is dropped and ServiceError 499 raised.

    A server that is handed a large answer at once keeps it for as long as the client likes. In
    pieces, it holds one or two.
    """

    __slots__ = ("_by", "_send", "_timeout", "_transport", "sent")

    def __init__(
        self, send: Send, timeout: float, transport: asyncio.Transport | None = None
    ) -> None:
        self._send = send
        self._timeout = timeout
        self._transport = transport
        self._by: float | None = None  # on the loop's clock, once the response has begun
        self.sent = 0  # bytes of the body that the server has taken

    async def __call__(self, message: Message) -> None:
        """Send one message of the response."""
        if self._by is None:
            self._by = asyncio.get_running_loop().time() + self._timeout
        body: bytes = message.get("body", b"")
        try:
            if len(body) > PIECE:
                await self._pieces(message["type"], body, self._by)
                message, body = {**message, "body": b""}, b""
            await within(self._send(message), self._by)
            self.sent += len(body)
        except TimeoutError:
            await self._drop()
            raise ServiceError(499, "client_slow", "the client does not take its answer") from None

    async def _pieces(self, kind: str, body: bytes, by: float) -> None:
        for at in range(0, len(body), PIECE):
            piece = body[at : at + PIECE]
            await within(self._send({"type": kind, "body": piece, "more_body": True}), by)
            self.sent += len(piece)

    async def _drop(self) -> None:
        # A server that closes waits until the client takes what it has been handed.
        if self._transport is not None:
            self._transport.abort()
            await asyncio.sleep(0)  # uvicorn notices before it is told that this is over
