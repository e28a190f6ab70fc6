"""Our application in this process, beside the bare session: what the server itself costs.

The application is called as a server would call it (ASGI), with the ledger and the metrics of a
worker process on; ``PROMETHEUS_MULTIPROC_DIR`` must be set before this starts.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from bench.http_floor import session
from bench.worker import serve
from service.app import Application, create_app
from service.settings import Settings

_HEADERS = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]


def overhead(bundle: str, data_dir: str, path: str, body: str, calls: int) -> dict[str, Any]:
    """Microseconds of one call of the application and of one run of the graph with the same row,
    ``calls`` of each in turn: medians, and the largest of a hundred (p99)."""
    return uvloop.run(_overhead(Path(bundle), Path(data_dir), path, body.encode(), calls))


async def _overhead(
    bundle: Path, data_dir: Path, path: str, body: bytes, calls: int
) -> dict[str, Any]:
    app = create_app(Settings(bundles=bundle, data_dir=data_dir, threads=1))
    bare = session(str(bundle / "predictor.onnx"))
    async with app.guarded.app.lifespan_context(app):  # type: ignore[attr-defined]
        assert app.core is not None
        model = app.core.model()
        rng = np.random.default_rng(0)
        feed = {
            s.name: rng.standard_normal((1, *s.shape[1:])).astype(s.dtype)
            for s in model.predictor.inputs
        }
        names = list(model.fields)
        ours, floor = [], []
        for i in range(calls + calls // 10):
            started = time.perf_counter()
            await _call(app, path, body)
            middle = time.perf_counter()
            bare.run(names, feed)
            if i >= calls // 10:
                ours.append(middle - started)
                floor.append(time.perf_counter() - middle)
    return {
        "application_us": 1e6 * statistics.median(ours),
        "session_us": 1e6 * statistics.median(floor),
        "overhead_us": 1e6 * (statistics.median(ours) - statistics.median(floor)),
        "application_p99_us": 1e6 * sorted(ours)[int(0.99 * len(ours))],
        "calls": calls,
    }


async def _call(app: Application, path: str, body: bytes) -> None:
    """One request through the whole application; AssertionError for any answer but 200."""
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
    await app(scope, receive, send)
    assert status == 200, status


if __name__ == "__main__":
    serve({"overhead": overhead})
