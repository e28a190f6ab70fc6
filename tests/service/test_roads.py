"""Every road to the model gives the numbers of the graph in ONNX Runtime, bit for bit."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import json
import struct
import subprocess
import sys

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from calibration.bundle import PREDICTOR
from service.media import ARROW
from tests.factory import CLASSES, rows
from tests.service.conftest import BentoServer
from tests.service.helpers import as_rows, healthy

ROWS = 5  # in every request: across shapes ONNX Runtime itself differs
FIELDS = ("label", "probs", "confidence", "entropy", "set", "set_size", "ood_score", "ood_pvalue")
X = rows("classification", ROWS, 11)[0]


@pytest.fixture(scope="module")
def bento(classifier, tmp_path_factory):
    home = tmp_path_factory.mktemp("bento")
    with BentoServer(home, HEDGED_BUNDLES=str(classifier)) as server:
        yield server


@pytest.fixture(scope="module")
def want(classifier):
    """The outputs of predictor.onnx, of no code of ours."""
    session = onnxruntime.InferenceSession(
        str(classifier / PREDICTOR), providers=["CPUExecutionProvider"]
    )
    return dict(zip(FIELDS, session.run(list(FIELDS), {"x": X}), strict=True))


def triton_request(binary):
    tensor = triton.InferInput("x", list(X.shape), "FP32")
    tensor.set_data_from_numpy(X, binary_data=binary)
    outputs = [triton.InferRequestedOutput(n, binary_data=binary) for n in FIELDS]
    return {"model_name": "tiny", "inputs": [tensor], "outputs": outputs}


def triton_client(server, binary):
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        found = client.infer(**triton_request(binary))
    return {name: found.as_numpy(name) for name in FIELDS}


def triton_aio_client(server, binary):
    async def ask():
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            return await client.infer(**triton_request(binary))

    found = asyncio.run(ask())
    return {name: found.as_numpy(name) for name in FIELDS}


def from_names(predictions):
    """Arrays of fields from rows in which classes are named."""
    index = {name: k for k, name in enumerate(CLASSES)}
    found = {n: [row[n] for row in predictions] for n in predictions[0]}
    found["label"] = [index[name] for name in found["label"]]
    found["set"] = [[name in members for name in CLASSES] for members in found["set"]]
    return found


def plain_json(server):
    body = {"rows": as_rows(X), "outputs": list(FIELDS)}
    return from_names(server.client.post("/v1/predict", json=body).json()["predictions"])


def arrow_stream(server):
    sink = io.BytesIO()
    table = pa.table(dict(zip("abcd", X.T, strict=True)))
    table = table.replace_schema_metadata({"outputs": json.dumps(FIELDS)})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    headers = {"content-type": ARROW}
    answer = server.client.post("/v1/predict", content=sink.getvalue(), headers=headers)
    return from_names(pa.ipc.open_stream(answer.content).read_all().to_pylist())


def bentoml_client(server):
    """In a process of its own: bentoml's client brings settings for the whole process."""
    ask = (
        "import bentoml, json, sys\n"
        "with bentoml.SyncHTTPClient(sys.argv[1]) as client:\n"
        "    print(json.dumps(client.predict(rows=json.load(sys.stdin))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask, f"http://127.0.0.1:{server.port}"],
        input=json.dumps(as_rows(X)),
        env=server.environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return from_names(json.loads(done.stdout))


ROADS = {
    "tritonclient, JSON": lambda server: triton_client(server, False),
    "tritonclient, binary": lambda server: triton_client(server, True),
    "tritonclient aio, JSON": lambda server: triton_aio_client(server, False),
    "tritonclient aio, binary": lambda server: triton_aio_client(server, True),
    "plain JSON": plain_json,
    "Arrow": arrow_stream,
    "bentoml.SyncHTTPClient": bentoml_client,
}


@pytest.mark.parametrize("road", ROADS)
def test_every_road_gives_the_graphs_numbers(bento, want, road):
    got = ROADS[road](bento)
    # BentoML's own API has no way to ask for more than the usual fields.
    fields = [n for n in FIELDS if n != "probs"] if road.startswith("bentoml") else FIELDS
    for name in fields:
        np.testing.assert_array_equal(np.asarray(got[name], want[name].dtype), want[name])


def test_a_poisoned_request_among_many_on_every_road_fails_alone(bento, want):
    def ask(k):
        x = np.full((1, 4), np.nan if k == 17 else 0.01 * k, np.float32)
        if k % 2:
            tensor = triton.InferInput("x", [1, 4], "FP32")
            tensor.set_data_from_numpy(x)
            with triton.InferenceServerClient(f"127.0.0.1:{bento.port}") as client:
                try:
                    client.infer("tiny", [tensor])
                except triton.InferenceServerException as e:
                    return int(e.status())
            return 200
        return bento.client.post("/v1/predict", json={"rows": as_rows(x)}).status_code

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        codes = list(pool.map(ask, range(64)))
    assert codes == [400 if k == 17 else 200 for k in range(64)]


# Bodies of the binary route: a head that is nearly right, a tail that is nearly as long, a length.
_ENTRY = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "u", "group", "z", ""]) | st.integers(),
        "datatype": st.sampled_from(["FP32", "FP64", "FP16", "INT8", "BOOL", "BYTES", "X"]),
        "shape": st.lists(st.integers(-1, 5) | st.sampled_from([4, 1 << 31, 1 << 62]), max_size=4),
    },
    optional={
        "data": st.lists(st.floats() | st.integers() | st.text(max_size=3) | st.none(), max_size=9),
        "parameters": st.fixed_dictionaries(
            {}, optional={"binary_data_size": st.integers(-1, 99) | st.sampled_from([16, 1 << 40])}
        ),
    },
)
_GOOD = st.just(
    {"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}
)
_HEAD = st.fixed_dictionaries(
    {"inputs": st.lists(_GOOD | _ENTRY, max_size=3)},
    optional={
        "id": st.text(max_size=4),
        "outputs": st.lists(st.fixed_dictionaries({"name": st.sampled_from(FIELDS)}), max_size=3),
        "parameters": st.fixed_dictionaries(
            {}, optional={"alpha": st.floats(), "binary_data_output": st.booleans()}
        ),
    },
)
BODIES = st.tuples(
    _HEAD.map(lambda head: json.dumps(head).encode()) | st.binary(max_size=60),
    st.binary(max_size=40) | st.just(bytes(16)) | st.just(struct.pack("4f", 1, 2, 3, 4)),
    st.none() | st.integers(-20, 20) | st.sampled_from(["", "x", "1e3", "9" * 30]),
)


@pytest.mark.parametrize("examples", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_no_body_of_the_binary_route_is_the_servers_fault(served, examples):
    server = served(max_rows=50, max_body_bytes=1 << 20)
    seen = {}

    @seed(0)
    @settings(
        max_examples=examples, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(BODIES)
    def ask(parts):
        head, tail, off = parts
        # None is the right length, a number is as far beside it, a text is what is sent.
        length = off if isinstance(off, str) else max(0, len(head) + (off or 0))
        headers = {"Inference-Header-Content-Length": str(length)}
        answer = server.client.post("/v2/models/tiny/infer", content=head + tail, headers=headers)
        assert answer.status_code < 500, answer.text
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        if sum(seen.values()) % 50 == 0:
            assert healthy(server)

    ask()
    assert healthy(server)
    assert set(seen) >= {200, 400}


def test_bentomls_own_api_refuses_arrow(bento):
    answer = bento.client.post("/predict", content=b"\x00" * 40, headers={"content-type": ARROW})
    assert 400 <= answer.status_code < 500
