"""A request and its body are let go once it is answered: the collector, which seldom looks, may
find nothing of it."""

from __future__ import annotations

import gc
import io
import json
import socket

import pyarrow as pa
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.guard import _Exchange
from tests.service.helpers import poll

ROW = [0.1, 0.2, 0.3, 0.4]
TENSOR = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": ROW}
BINARY = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
HEAD = json.dumps({"inputs": [BINARY]}).encode()
JSON = {"content-type": "application/json"}
INFER = "/v2/models/tiny/infer"


def arrow():
    out = io.BytesIO()
    batch = pa.record_batch(
        {"x": pa.FixedSizeListArray.from_arrays(pa.array(ROW, pa.float32()), 4)}
    )
    with pa.ipc.new_stream(out, batch.schema) as stream:
        stream.write_batch(batch)
    return out.getvalue()


# name: (method, path, body, headers, status)
REQUESTS = {
    "rows": ("POST", "/v1/predict", json.dumps({"inputs": {"x": [ROW]}}), JSON, 200),
    "tensors": ("POST", INFER, json.dumps({"inputs": [TENSOR]}), JSON, 200),
    "binary": (
        "POST",
        INFER,
        HEAD + bytes(16),
        {"inference-header-content-length": str(len(HEAD))},
        200,
    ),
    "arrow": (
        "POST",
        "/v1/predict",
        arrow(),
        {"content-type": "application/vnd.apache.arrow.stream"},
        200,
    ),
    "label": ("POST", "/v1/labels", '{"id": "nobody", "label": "a", "model": "tiny"}', JSON, 200),
    "metrics": ("GET", "/metrics", None, {}, 200),
    "page": ("GET", "/", None, {}, 200),
    "no such path": ("GET", "/nowhere", None, {}, 404),
    "another method": ("PUT", "/v1/predict", "{}", JSON, 405),
    "too large": ("POST", "/v1/predict", b"x" * 20_000, JSON, 413),
    "another type": ("POST", "/v1/predict", "x", {"content-type": "text/plain"}, 415),
    "no JSON": ("POST", "/v1/predict", "{", JSON, 400),
    "no numbers": ("POST", "/v1/predict", json.dumps({"inputs": {"x": [["a"] * 4]}}), JSON, 400),
}


@pytest.fixture(scope="module")
def server(served):
    return served(max_body_bytes=10_000)


@pytest.fixture
def uncollected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive(kind):
    return [one for one in gc.get_objects() if type(one) is kind]


def counted():
    return len(alive(_Exchange)), len(alive(RequestResponseCycle))


def are_let_go(before):
    """A connection keeps its last request until the next one, without the body."""
    poll(counted, lambda found: found[0] <= before[0] and found[1] <= before[1] + 1, seconds=5)
    assert not [1 for cycle in alive(RequestResponseCycle) if "hedged.body" in cycle.scope]


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answered_request_is_let_go(server, uncollected, name):
    method, path, body, headers, status = REQUESTS[name]
    server.client.request(method, path, content=body, headers=headers)  # the label is new once
    before = counted()
    for _ in range(20):
        answer = server.client.request(method, path, content=body, headers=headers)
        assert answer.status_code == status, answer.text
    are_let_go(before)


def test_a_request_whose_client_is_gone_is_let_go(server, uncollected):
    before = counted()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            head = "POST /v1/predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            client.sendall(f"{head}content-length: 9000\r\n\r\n{{".encode())
    are_let_go(before)
