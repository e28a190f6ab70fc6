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

from bench.asgi import running, timed
from bench.http_floor import session
from bench.worker import serve


def overhead(bundle: str, data_dir: str, path: str, body: str, calls: int) -> dict[str, Any]:
    """Microseconds of one call of the application and of one run of the graph with the same row,
    ``calls`` of each in turn: medians, and the largest of a hundred (p99)."""
    return uvloop.run(_overhead(Path(bundle), Path(data_dir), path, body.encode(), calls))


async def _overhead(
    bundle: Path, data_dir: Path, path: str, body: bytes, calls: int
) -> dict[str, Any]:
    bare = session(str(bundle / "predictor.onnx"))
    async with running(bundle, data_dir) as app:
        assert app.core is not None
        model = app.core.model()
        with np.load(bundle / "golden.npz", allow_pickle=False) as data:
            feed = {s.name: data[f"in/{s.name}"][:1] for s in model.predictor.inputs}
        names = list(model.fields)
        ours, floor = [], []
        for i in range(calls + calls // 10):
            seconds = await timed(app, path, body)
            started = time.perf_counter()
            bare.run(names, feed)
            if i >= calls // 10:
                ours.append(seconds)
                floor.append(time.perf_counter() - started)
    return {
        "application_us": 1e6 * statistics.median(ours),
        "session_us": 1e6 * statistics.median(floor),
        "overhead_us": 1e6 * (statistics.median(ours) - statistics.median(floor)),
        "application_p99_us": 1e6 * sorted(ours)[int(0.99 * len(ours))],
        "calls": calls,
    }


if __name__ == "__main__":
    serve({"overhead": overhead})
