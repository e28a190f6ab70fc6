"""The prediction path with the ledger and without it, in one process and in turn.

``PROMETHEUS_MULTIPROC_DIR`` must be set before this starts, as it is in a worker of a server.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import uvloop

from bench.worker import serve
from service.app import Application, create_app
from service.settings import Settings

_HEADERS = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]


class _Silent:
    """A ledger that keeps nothing."""

    def record(self, *_: Any, **__: Any) -> bool:
        """As `service.ledger.Ledger.record`."""
        return True


def ratio(bundle: str, folder: str, path: str, body: str, rounds: int, calls: int) -> Any:
    """Seconds of a call, the median of each of ``rounds`` blocks of ``calls``: on and off."""
    return uvloop.run(_ratio(Path(bundle), Path(folder), path, body.encode(), rounds, calls))


async def _ratio(
    bundle: Path, folder: Path, path: str, body: bytes, rounds: int, calls: int
) -> dict[str, list[float]]:
    apps = {
        name: create_app(Settings(bundles=bundle, data_dir=folder / name, threads=1))
        for name in ("on", "off")
    }
    on, off = apps.values()
    found: dict[str, list[float]] = {name: [] for name in apps}
    async with (
        on.guarded.app.lifespan_context(on),  # type: ignore[attr-defined]
        off.guarded.app.lifespan_context(off),  # type: ignore[attr-defined]
    ):
        assert on.core is not None and off.core is not None
        off.core.ledger = _Silent()  # type: ignore[assignment]
        for turn in range(rounds + 1):
            # Who comes first changes, so that neither always follows the other's work.
            for name in sorted(apps, reverse=bool(turn % 2)):
                times = [await _timed(apps[name], path, body) for _ in range(calls)]
                assert on.core.ledger.flush(60)
                if turn:  # the first warms up
                    found[name].append(statistics.median(times))
        served = sum(m["served"] for m in on.core.ledger.calibration()["models"])
        assert served == (rounds + 1) * calls, served
    return found


async def _timed(app: Application, path: str, body: bytes) -> float:
    """Seconds of one request through the whole application."""
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


if __name__ == "__main__":
    serve({"ratio": ratio})
