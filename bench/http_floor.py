"""The least that can answer over HTTP: Starlette, orjson and one run of the graph, nothing else.

``python -m bench.http_floor GRAPH FEED PORT OUTPUT,…``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def session(graph: str) -> ort.InferenceSession:
    """One thread, as every side of the benchmark has."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def input_dtype(model: ort.InferenceSession, feed: str) -> np.dtype[Any]:
    """The dtype of the input ``feed``: magika's are int32, a table's float32."""
    kind = next(i.type for i in model.get_inputs() if i.name == feed)
    return np.dtype({"tensor(float)": np.float32, "tensor(int32)": np.int32}[kind])


def application(graph: str, feed: str, outputs: list[str]) -> Starlette:
    """POST / {"x": [[…]]} → the outputs as JSON. ``feed`` names the input."""
    model = session(graph)
    dtype = input_dtype(model, feed)

    async def predict(request: Request) -> Response:
        x = np.asarray(orjson.loads(await request.body())["x"], dtype)
        values = model.run(outputs, {feed: x})
        answer = dict(zip(outputs, map(np.ascontiguousarray, values), strict=True))
        body = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(body, media_type="application/json")

    return Starlette(routes=[Route("/", predict, methods=["POST"])])


def main() -> None:
    """Serve until it is ended."""
    graph, feed, port, outputs = sys.argv[1:]
    uvicorn.run(
        application(str(Path(graph)), feed, outputs.split(",")),
        host="127.0.0.1",
        port=int(port),
        log_level="error",
        access_log=False,
    )


if __name__ == "__main__":
    main()
