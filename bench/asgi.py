"""One request through the whole application, called as a server calls it, without a network."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from service.app import Application, create_app
from service.settings import Settings

_HEADERS = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]


@asynccontextmanager
async def running(bundle: Path, data_dir: Path) -> AsyncIterator[Application]:
    """The application of a bundle, one thread of the model, between its start and its end."""
    app = create_app(Settings(bundles=bundle, data_dir=data_dir, threads=1))
    async with app.lifespan():
        yield app


async def timed(app: Application, path: str, body: bytes) -> float:
    """Seconds until a POST is answered; AssertionError for any answer but 200."""
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [*_HEADERS, (b"content-length", str(len(body)).encode())],
        "server": ("127.0.0.1", 3000),
        "client": ("127.0.0.1", 50_000),
    }
    started = time.perf_counter()
    await app(scope, receive, send)
    assert status == 200, status
    return time.perf_counter() - started
