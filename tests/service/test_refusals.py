"""Requests that cannot be answered: each is refused by name, and the server answers on."""

from __future__ import annotations

import re

import numpy as np
import orjson
import pytest
import tritonclient.http as triton

from tests.factory import rows
from tests.service.helpers import as_rows, healthy


@pytest.fixture(scope="module")
def server(served):
    return served(max_rows=100, max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def x():
    return rows("classification", 7, 5)[0]


BAD = np.zeros((3, 4))
REQUESTS = {
    "rows and inputs": ({"rows": as_rows(BAD), "inputs": {}}, "either 'rows'"),
    "neither": ({}, "either 'rows'"),
    "unknown key": ({"rows": as_rows(BAD), "alhpa": 0.1}, "'alhpa'"),
    "no rows": ({"rows": []}, "at least one"),
    "row is no object": ({"rows": [[1, 2, 3, 4]]}, "row 0 is a JSON array"),
    "missing column": ({"rows": [*as_rows(BAD), {"a": 1, "b": 1, "c": 1}]}, "row 3 has no .* 'd'"),
    "unknown column": ({"rows": [{**as_rows(BAD)[0], "e": 1}]}, "row 0 has column 'e'"),
    "text": ({"rows": [*as_rows(BAD), {"a": 1, "b": "x", "c": 1, "d": 1}]}, "row 3, column 'b'"),
    "null": ({"rows": [{"a": None, "b": 0, "c": 1, "d": 1}]}, "row 0, column 'a' holds a null"),
    "list": ({"rows": [{"a": [1], "b": 0, "c": 1, "d": 1}]}, "input 'x'|ragged|shaped"),
    "overflow": ({"inputs": {"x": [[0, 0, 0, 0], [0, 1e300, 0, 0]]}}, "row 1 .* is not finite"),
    "shape": ({"inputs": {"x": [[0, 0, 0]]}}, r"shape \[1, 3\]; the model takes \[N, 4\]"),
    "ragged": ({"inputs": {"x": [[0, 0, 0, 0], [0]]}}, "ragged"),
    "unknown input": ({"inputs": {"z": [[0]]}}, "no input 'z'"),
    "missing input": ({"inputs": {}}, "input 'x' is missing"),
    "too many rows": ({"inputs": {"x": np.zeros((101, 4)).tolist()}}, "101 rows"),
    "booleans": ({"inputs": {"x": [[True] * 4]}}, "booleans"),
    "unknown output": ({"rows": as_rows(BAD), "outputs": ["speed"]}, "no output 'speed'"),
    "ids": ({"rows": as_rows(BAD), "ids": ["a", "b"]}, "2 ids"),
    "id twice": ({"rows": as_rows(BAD), "ids": ["a", "b", "a"]}, "more than one row"),
    "bad id": ({"rows": as_rows(BAD), "id": "a b"}, "'a b'"),
    "long id": ({"rows": as_rows(BAD), "id": "x" * 127}, "128"),
    "alpha": ({"rows": as_rows(BAD), "alpha": 1.5}, "alpha"),
    "tiny alpha": ({"rows": as_rows(BAD), "alpha": 5e-324}, "needs at least .* conformal rows"),
    "alphas": ({"rows": as_rows(BAD), "alpha": [0.1]}, "1 values of alpha"),
    "alpha text": ({"rows": as_rows(BAD), "alpha": "0.1"}, "alpha"),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_refusals_name_the_problem_and_the_server_answers_on(server, name):
    body, says = REQUESTS[name]
    answer = server.client.post("/v1/predict", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert re.search(says, error["message"])
    assert error["request_id"] == answer.headers["x-request-id"]
    assert healthy(server)


def test_what_is_not_finite_is_refused_by_row(server, x):
    bad = x.copy()
    bad[3, 1] = np.nan
    tensor = triton.InferInput("x", list(bad.shape), "FP32")
    tensor.set_data_from_numpy(bad)
    with (
        triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
        pytest.raises(triton.InferenceServerException, match="row 3 of input 'x' is not finite"),
    ):
        client.infer("tiny", [tensor])
    literal = server.client.post(
        "/v1/predict",
        content=b'{"inputs": {"x": [[NaN, 0, 0, 0]]}}',
        headers={"content-type": "application/json"},
    )
    assert literal.status_code == 400
    assert "not JSON" in literal.json()["error"]["message"]
    assert healthy(server)


@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/tiny/infer", "/v1/labels"])
def test_bodies_that_are_garbage_or_too_large(server, path):
    def post(content, **headers):
        answer = server.client.post(
            path, content=content, headers={"content-type": "application/json", **headers}
        )
        error = answer.json()["error"]
        return answer.status_code, error if isinstance(error, str) else error["message"]

    status, message = post(b"\x00garbage{")
    assert status == 400
    assert "not JSON" in message
    status, message = post(b"x" * (3 << 20))
    assert status == 413
    assert str(1 << 20) in message
    status, _ = post(b"x" * 65536 for _ in range(40))  # chunked: no length is declared
    assert status == 413
    status, _ = post(b"{}", **{"content-encoding": "gzip"})
    assert status == 415
    status, _ = post(b"{}", **{"content-type": "text/plain"})
    assert status == 415
    assert healthy(server)


def test_a_long_body_is_refused_before_it_is_parsed_and_a_wide_one_is_answered(server, x):
    def post(content):
        return server.client.post(
            "/v1/predict", content=content, headers={"content-type": "application/json"}
        )

    many = post(b'{"inputs":{"x":[' + b"[1,2,3,4]," * 90_000 + b"[1,2,3,4]]}}")
    assert many.status_code == 413
    assert many.json()["error"]["code"] == "too_many_values"
    wide = post(orjson.dumps({"inputs": {"x": x.tolist()}, "id": "w"}) + b" " * 600_000)
    small = post(orjson.dumps({"inputs": {"x": x.tolist()}, "id": "w"}))
    assert wide.json() == small.json()
    broken = post(b"[" + b" " * 600_000)
    assert broken.status_code == 400
    tensor = triton.InferInput("x", [60_000, 4], "FP32")
    tensor.set_data_from_numpy(np.zeros((60_000, 4), np.float32))
    with (
        triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
        pytest.raises(triton.InferenceServerException, match="60000 rows"),
    ):
        client.infer("tiny", [tensor])
    labels = server.client.post("/v1/labels", json=[{"id": "a", "label": 1}] * 30_000)
    assert labels.status_code == 202
    assert labels.json()["counts"] == {"duplicate": 29_999, "pending": 1}


DEEP = 100_000
NESTED = {
    "lists": b"[" * DEEP + b"]" * DEEP,
    "objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "open": b"[" * DEEP,
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize(
    ("path", "around"),
    [
        ("/v1/predict", b'{"inputs":{"x":%s}}'),
        ("/v1/predict", b'{"rows":[{"a":%s}]}'),
        ("/v1/predict", b"%s"),
        ("/v1/models/tiny/predict", b'{"alpha":%s}'),
        ("/v2/models/tiny/infer", b'{"inputs":[{"name":"x","data":%s}]}'),
        ("/v2/models/tiny/versions/1/infer", b'{"parameters":%s}'),
        ("/v1/labels", b'{"id":"a","label":%s}'),
        ("/v1/labels", b"%s"),
    ],
)
def test_json_of_any_depth_is_refused(server, path, around, name):
    body = around.replace(b"%s", NESTED[name])
    for media_type in ("application/json", *(["application/x-ndjson"] * path.endswith("labels"))):
        answer = server.client.post(path, content=body, headers={"content-type": media_type})
        assert answer.status_code in (400, 413), answer.text
    assert healthy(server)


def test_rank_is_bounded(server):
    nested = 0
    for _ in range(17):
        nested = [nested]
    answer = server.client.post("/v1/predict", json={"inputs": {"x": nested}})
    assert answer.status_code == 400
    assert "nested deeper than 16 levels" in answer.text
    tensor = {"name": "x", "datatype": "FP32", "data": [0]}
    for shape in ([1] * 17, [2**41], [2**31, 2**31, 0]):
        body = {"inputs": [{**tensor, "shape": shape}]}
        answer = server.client.post("/v2/models/tiny/infer", json=body)
        assert answer.status_code == 400
        assert "at most 16 sizes, of at most 2^40 values" in answer.text
    assert healthy(server)
