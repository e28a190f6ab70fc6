"""The outermost layer: what a client sends is bounded here before anything else sees it.

A plain ASGI class around any application. It reads the body itself, counting what arrives, so
that the application gets one whole body or none; it names the request, times it under its route's
template, turns whatever went wrong inside into one error shape, and cuts off who does not take
the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import instruments, media
from service.errors import ServiceError, error_body, is_oip, overloaded, shorten
from service.ids import new_id, valid_id
from service.later import Later
from service.logs import RequestLog
from service.sender import Sender
from service.within import within

MEDIA_TYPES = (media.JSON, media.BINARY, media.NDJSON, media.ARROW, media.PARQUET)
_CODES = {404: "not_found", 405: "method_not_allowed"}
_DRAIN = 4  # a refused body is read on to this many times the limit
OTHER = "other"  # the route label of every path that the application does not know
_BODYLESS = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_NO_SNIFF = (b"x-content-type-options", b"nosniff")
_HTML_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)
_log = logging.getLogger("hedged.guard")


class Guard:
    """Bounds, names, times and answers for an ASGI application.

    The application finds the whole body in ``scope["hedged.body"]`` (and through ``receive``), the
    headers by name in ``scope["hedged.headers"]`` (of one that is sent twice the first), the
    request's id in ``scope["hedged.request_id"]``, and in ``scope["hedged.reserve"]`` whom to tell
    the bytes of an answer before it is made: that raises ServiceError 503 where the answers of all
    requests together would be more than ``max_answer_bytes_total``. It may put the served model's
    name and the number of rows into ``scope["hedged.facts"]``, for the ``log``.

    ``access`` is asked first, and raises ServiceError for who may not. Requests whose body is
    larger than ``max_body_bytes``, takes longer than ``body_timeout`` seconds to arrive, is
    compressed, or is of a media type outside ``media_types`` are refused before the application is
    called, and so are those for whose body ``max_body_bytes_total`` of all bodies together leaves
    no room. A client that has not taken its whole answer within ``send_timeout`` seconds is cut
    off: dropped, where ``scope["hedged.transport"]`` is the connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        max_body_bytes_total: int | None = None,
        max_answer_bytes_total: int = sys.maxsize,
        body_timeout: float = 30.0,
        send_timeout: float = 60.0,
        media_types: Sequence[str] = MEDIA_TYPES,
        access: Callable[[Scope], None] | None = None,
        log: RequestLog | None = None,
        later: Later | None = None,
    ) -> None:
        self.app = app
        self.later = later or Later()
        self.max_body_bytes = max_body_bytes
        self.max_body_bytes_total = max_body_bytes_total or 4 * max_body_bytes
        self.max_answer_bytes_total = max_answer_bytes_total
        self.held = 0  # bytes of the bodies of all requests that are not answered yet
        self.reserved = 0  # bytes of answers that are being made or sent
        self.body_timeout = body_timeout
        self.send_timeout = send_timeout
        self.media_types = frozenset(media_types)
        self.access = access
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        else:  # a websocket: closing before accepting is a 403
            await send({"type": "websocket.close", "code": 1008})


class _Exchange:
    """One request and its response."""

    __slots__ = (
        "code",
        "ended",
        "guard",
        "headers",
        "held",
        "receive",
        "replayed",
        "request_id",
        "reserved",
        "scope",
        "send_on",
        "status",
    )

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard = guard
        self.scope = scope
        self.receive = receive
        self.send_on = Sender(send, guard.send_timeout, scope.get("hedged.transport"))
        self.status = 0  # of the response, once it has begun
        self.code: str | None = None  # of the error, if there is one
        self.ended = scope["method"] in _BODYLESS  # nothing of the body is still to come
        self.replayed = False
        self.held = 0  # bytes of this body
        self.reserved = 0  # bytes of this answer
        self.headers: dict[bytes, bytes] = dict(reversed([*scope["headers"]]))
        self.request_id = _request_id(self.headers.get(b"x-request-id"))

    async def run(self) -> None:
        start = time.perf_counter()
        guard, scope = self.guard, self.scope
        scope["hedged.request_id"] = self.request_id
        scope["hedged.headers"] = self.headers
        scope["hedged.reserve"] = self.reserve
        scope["hedged.facts"] = {}
        try:
            if guard.access is not None:
                guard.access(scope)
            scope["hedged.body"] = b"" if self.ended else await self.read_body()
            await guard.app(scope, self.replay, self.send)
        except ServiceError as e:
            await self.refuse(e)
        except HTTPException as e:  # the router's: no such path, another method
            code = _CODES.get(e.status_code, "http_error")
            await self.refuse(ServiceError(e.status_code, code, e.detail, headers=e.headers))
        except Exception:
            _log.exception("request %s failed", self.request_id)
            await self.refuse(ServiceError(500, "internal", "the server failed on this request"))
        finally:
            # A server keeps the scope while the connection is idle. It need not keep the body, nor
            # may it keep this, which keeps the scope: the collector seldom looks for such cycles.
            scope.pop("hedged.body", None)
            del scope["hedged.reserve"]
            guard.held -= self.held
            guard.reserved -= self.reserved
            seconds = time.perf_counter() - start
            status = self.status or 499
            guard.later.add(instruments.observe_requests, (_route(scope), status, seconds))
            if guard.log is not None and guard.log.wants(status, seconds):
                self.write_log(guard.log, status, seconds)

    def write_log(self, log: RequestLog, status: int, seconds: float) -> None:
        log.write(
            status,
            seconds,
            code=self.code,
            method=shorten(self.scope["method"]),
            route=_route(self.scope),
            request_id=self.request_id,
            caller=self.scope.get("hedged.caller"),
            bytes_in=self.held,
            bytes_out=self.send_on.sent,
            **self.scope["hedged.facts"],
        )

    async def read_body(self) -> bytes:
        """The whole body. Raises ServiceError 408, 413, 415, or 499 when the client went away."""
        if b"content-encoding" in self.headers:
            raise ServiceError(
                415, "unsupported_encoding", "Content-Encoding is not accepted; send the body plain"
            )
        self.check_media_type(self.headers.get(b"content-type"))
        limit = self.guard.max_body_bytes
        declared = self.headers.get(b"content-length", b"0")
        if declared.isdigit() and (len(declared) > 19 or int(declared) > limit):
            raise _too_large(limit)
        self.check_room(int(declared) if declared.isdigit() else 0)
        parts: list[bytes] = []
        by = asyncio.get_running_loop().time() + self.guard.body_timeout
        try:
            while not self.ended:
                part = await within(self.next_part(), by)
                parts.append(part)
                self.held += len(part)
                self.guard.held += len(part)
                if self.held > limit:
                    raise _too_large(limit)
                self.check_room()
        except TimeoutError:
            seconds = f"{self.guard.body_timeout:g} s"
            raise ServiceError(408, "body_timeout", f"no whole body within {seconds}") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check_room(self, more: int = 0) -> None:
        if self.guard.held + more > self.guard.max_body_bytes_total:
            raise overloaded("the server holds too many large requests", "bodies_full")

    def reserve(self, size: int) -> None:
        """Count an answer of so many bytes until it is sent. An idle server takes any."""
        if 0 < self.guard.reserved > self.guard.max_answer_bytes_total - size:
            raise overloaded("the server makes too many large answers", "answers_full")
        self.reserved += size
        self.guard.reserved += size

    def check_media_type(self, sent: bytes | None) -> None:
        # Stock OIP clients send none. Elsewhere it must be there: without one a page of another
        # site can post unasked.
        if sent is None and is_oip(self.scope["path"]):
            return
        media_type = media.media_type((sent or b"").decode("latin-1"))
        if media_type not in self.guard.media_types:
            raise ServiceError(
                415,
                "unsupported_media_type",
                f"Content-Type {shorten(media_type)!r} is not accepted; "
                f"send one of {', '.join(sorted(self.guard.media_types))}",
            )

    async def next_part(self) -> bytes:
        message = await self.receive()
        if message["type"] == "http.disconnect":
            self.ended = True
            raise ServiceError(499, "client_gone", "the client closed the connection")
        self.ended = not message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part

    async def drain(self) -> None:
        """Discard what is left of a refused body, up to a bound.

        A client that is still sending would meet a reset connection instead of the reason.
        """
        left = _DRAIN * self.guard.max_body_bytes
        with contextlib.suppress(TimeoutError, ServiceError):
            async with asyncio.timeout(self.guard.body_timeout):
                while not self.ended and left > 0:
                    left -= len(await self.next_part())

    async def replay(self) -> Message:
        """The body once, whole; then what the server says, which is only a disconnect."""
        if self.replayed:
            return await self.receive()
        self.replayed = True
        return {"type": "http.request", "body": self.scope["hedged.body"], "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": self.completed(message.get("headers", ()))}
        try:
            await self.send_on(message)
        except ServiceError as e:
            self.status, self.code = e.status, e.code
            instruments.count_rejected(e.code)
            raise

    def completed(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The application's headers, the request's id, and what a browser must be told."""
        found = [*headers, (b"x-request-id", self.request_id.encode()), _NO_SNIFF]
        for name, value in found:
            if name == b"content-type" and value.startswith(b"text/html"):
                return [*found, *_HTML_HEADERS]
        return found

    async def refuse(self, error: ServiceError) -> None:
        """Answer with an error, unless an answer has begun or nobody is there to read it."""
        self.code = self.code or error.code
        if self.status or error.status == 499:
            return
        instruments.count_rejected(error.code)
        # A client that timed out, or that asks before it sends, is sending nothing just now.
        if error.status != 408 and b"expect" not in self.headers:
            await self.drain()
        body = error_body(self.scope["path"], error.code, error.message, self.request_id)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((k.lower().encode(), v.encode()) for k, v in error.headers.items()),
        ]
        if not self.ended:
            headers.append((b"connection", b"close"))
        start = {"type": "http.response.start", "status": error.status, "headers": headers}
        with contextlib.suppress(ServiceError):  # the client does not take even this
            await self.send(start)
            await self.send({"type": "http.response.body", "body": body})


def _too_large(limit: int) -> ServiceError:
    return ServiceError(413, "body_too_large", f"the body is larger than {limit} bytes")


def _request_id(sent: bytes | None) -> str:
    """The client's X-Request-Id where it is a valid id, else a new one."""
    given = "" if sent is None else sent.decode("latin-1")
    return given if valid_id(given) else new_id()


def _route(scope: Scope) -> str:
    """The template of the route that matched, so that addresses cannot make metric series."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else OTHER
