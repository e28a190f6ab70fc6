"""The application behind a real server: stock OIP clients, plain HTTP, addresses."""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import tritonclient.http as triton

from calibration.predictor import Predictor
from service.ledger import Ledger
from tests.factory import CLASSES, rows
from tests.service.conftest import ROOT
from tests.service.helpers import as_rows
from tests.service.streams import Exposition, classification


@pytest.fixture(scope="module")
def server(served):
    return served(max_rows=100, max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def regression(served):
    return served("regression")


@pytest.fixture(scope="module")
def direct(classifier):
    return Predictor(classifier)


@pytest.fixture(scope="module")
def x():
    return rows("classification", 7, 5)[0]


@pytest.mark.parametrize("binary", [False, True])
def test_a_stock_client_gets_the_graphs_numbers(server, direct, x, binary):
    want = direct.run({"x": x}, outputs=[*direct.fields, "y"])
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert client.is_model_ready("tiny", "1")
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        described = client.get_model_metadata("tiny")
        assert described["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
        tensor = triton.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x, binary_data=binary)
        outputs = [triton.InferRequestedOutput(n, binary_data=binary) for n in want]
        result = client.infer("tiny", [tensor], outputs=outputs, request_id="stock-1")
        everything = client.infer("tiny", [tensor])
    assert result.get_response()["id"] == "stock-1"
    assert [o["name"] for o in described["outputs"]] == list(want)
    for name, value in want.items():
        np.testing.assert_array_equal(result.as_numpy(name), value)
        assert result.as_numpy(name).dtype == value.dtype
        np.testing.assert_array_equal(everything.as_numpy(name), value)


def test_alpha_moves_the_set_and_only_the_set(server, direct, x):
    def infer(alpha):
        parameters = {} if alpha is None else {"alpha": alpha}
        body = {
            "inputs": [
                {"name": "x", "datatype": "FP64", "shape": list(x.shape), "data": x.tolist()}
            ],
            "outputs": [{"name": "set_size"}, {"name": "confidence"}],
            "parameters": parameters,
        }
        got = server.client.post("/v2/models/tiny/infer", json=body).raise_for_status().json()
        return [np.array(o["data"], np.float32) for o in got["outputs"]]

    for alpha in (None, 0.3, 0.05, 0.017):
        q = None if alpha is None else direct.q_hat(alpha)
        want = direct.run({"x": x}, outputs=["set_size", "confidence"], q_hat=q)
        sizes, confidence = infer(alpha)
        np.testing.assert_array_equal(sizes, want["set_size"])
        np.testing.assert_array_equal(confidence, want["confidence"])
    refused = server.client.post("/v1/predict", json={"rows": as_rows(x), "alpha": 1e-9})
    assert refused.status_code == 400
    assert "conformal rows" in refused.json()["error"]["message"]


def test_rows_by_name_and_tensors_give_one_answer(server, direct, x):
    want = direct.run({"x": x})
    by_name = server.client.post("/v1/predict", json={"rows": as_rows(x), "id": "n"}).json()
    by_tensor = server.client.post(
        "/v1/models/tiny/predict", json={"inputs": {"x": x.tolist()}, "id": "n"}
    ).json()
    assert by_name == by_tensor
    assert by_name["model"] == "tiny"
    assert by_name["version"] == "1"
    for k, row in enumerate(by_name["predictions"]):
        assert row["id"] == f"n:{k}"
        assert row["label"] == CLASSES[want["label"][k]]
        assert row["set"] == [
            c for c, inside in zip(CLASSES, want["set"][k], strict=True) if inside
        ]
        assert row["ood"] is bool(want["ood"][k])
        assert np.float32(row["confidence"]) == want["confidence"][k]
        assert "probs" not in row
    asked = server.client.post(
        "/v1/predict", json={"rows": as_rows(x), "outputs": ["probs"], "ids": list("tuvwxyz")}
    ).json()["predictions"]
    assert [row["id"] for row in asked] == list("tuvwxyz")
    np.testing.assert_array_equal(
        np.array([row["probs"] for row in asked], np.float32), want["probs"]
    )


def test_a_level_for_each_row(server, direct, x):
    alphas = [0.05, 0.1, 0.3, 0.05, 0.1, 0.3, 0.5]
    got = server.client.post("/v1/predict", json={"rows": as_rows(x), "alpha": alphas}).json()
    q = np.array([direct.q_hat(a) for a in alphas])
    want = direct.run({"x": x}, outputs=["set_size"], q_hat=q)["set_size"]
    assert [row["set_size"] for row in got["predictions"]] == want.tolist()


def test_the_id_column_of_the_table_names_rows(server, x):
    table = [{**row, "id": f"row.{k}", "target": "a"} for k, row in enumerate(as_rows(x))]
    got = server.client.post("/v1/predict", json={"rows": table}).json()
    assert [row["id"] for row in got["predictions"]] == [f"row.{k}" for k in range(7)]


def test_regression_gives_numbers_in_the_targets_units(regression, regressor):
    x = rows("regression", 4, 3)[0]
    predictor = Predictor(regressor)
    want = predictor.run({"x": x})
    got = regression.client.post(
        "/v1/predict", json={"rows": as_rows(x, "pqr"), "alpha": 0.05}
    ).json()["predictions"]
    wide = predictor.run({"x": x}, q_hat=predictor.q_hat(0.05))
    levels = [format(q, "g") for q in predictor.manifest.quantile_levels]
    for k, row in enumerate(got):
        assert np.float32(row["mean"]) == want["mean"][k, 0]
        assert np.float32(row["lower"]) == wide["lower"][k, 0]
        assert np.float32(row["upper"]) == wide["upper"][k, 0]
        assert list(row["quantiles"]) == levels
    with triton.InferenceServerClient(f"127.0.0.1:{regression.port}") as client:
        tensor = triton.InferInput("x", [4, 3], "FP32")
        tensor.set_data_from_numpy(x)
        np.testing.assert_array_equal(
            client.infer("tiny", [tensor]).as_numpy("quantiles"), want["quantiles"]
        )


def test_unknown_things_are_404(server):
    for path in ("/v2/models/other", "/v2/models/tiny/versions/9", "/v2/models/other/ready"):
        answer = server.client.get(path)
        assert answer.status_code == 404
        assert isinstance(answer.json()["error"], str)
    assert server.client.post("/v1/models/other/predict", json={}).status_code == 404
    assert server.client.delete("/v1/predictions/never-seen").status_code == 404
    assert server.client.get("/v1/calibration", params={"model": "other"}).status_code == 404
    assert server.client.get("/v2/").status_code == 404
    assert server.client.get("/v1/predict").status_code == 405


def test_a_poisoned_request_among_many_fails_alone(server, x):
    def ask(k):
        row = [[1e300 if k == 17 else 0.1 * k, 0, 0, 0]]
        return server.client.post("/v1/predict", json={"inputs": {"x": row}}).status_code

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(ask, range(64)))
    assert codes == [400 if k == 17 else 200 for k in range(64)]


@pytest.mark.parametrize("requests", [300, pytest.param(3000, marks=pytest.mark.long)])
def test_random_addresses_leave_the_metrics_as_they_were(server, requests):
    rng = np.random.default_rng(0)
    for method in ("GET", "POST", "DELETE", "BREW"):
        server.client.request(method, "/nowhere", headers={"content-type": "application/json"})
    server.client.get("/metrics")
    before = len(server.client.get("/metrics").text.splitlines())
    for k in range(requests):
        noise = rng.bytes(6).hex()
        server.client.request(
            ["GET", "POST", "DELETE", "BREW"][k % 4],
            f"/{noise}/{k}",
            headers={"content-type": "application/json"},
        )
    assert len(server.client.get("/metrics").text.splitlines()) == before


def test_health_and_pages(server):
    assert server.client.get("/livez").json() == {"live": True}
    assert server.client.get("/readyz").json() == {"ready": True, "unavailable": []}
    page = server.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("page.js", "page.css"):
        assert name in page.text
        assert server.client.get(f"/{name}").status_code == 200


def test_a_slow_client_is_cut_off(served):
    server = served(request_timeout_s=0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as conn:
        conn.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = b""
        while chunk := conn.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["error"]["code"] == "body_timeout"


@pytest.mark.parametrize("module", ["service.app", "service.bento"])
def test_the_serving_process_loads_no_library_that_it_does_not_need(module, classifier):
    forbidden = ("torch", "onnx", "sklearn", "plotly", "pyarrow", "pandas")
    code = f"import sys, {module}; print([m for m in {forbidden} if m in sys.modules])"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("HEDGED_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environ | {"HEDGED_BUNDLES": str(classifier)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_versions_that_were_served_earlier_start_at_zero(served, tmp_path):
    stream = classification(3, classes=3)
    store = str(tmp_path / "ledger.sqlite")
    ledger = Ledger.open(store)
    names = ("earlier", "unused")
    for version in names:
        ledger.register(
            "tiny", version, "b" * 64, task="classification", width=3, levels=["0.9", "0.8"]
        )
    ledger.record("tiny", "earlier", "b" * 64, stream.ids, stream.fields, "0.9")
    ledger.close()
    server = served(ledger=store)
    x = Exposition(server.client.get("/metrics").text)
    labels = {"model": "tiny", "version": "earlier"}
    assert len(x.values("uq_labeled_predictions_total", **labels)) == 20
    covered = x.values("uq_interval_covered_total", **labels)
    assert covered == {frozenset({("level", level)}): 0 for level in ("0.9", "0.8")}
    assert x.total("uq_log_loss_sum_total", **labels) == 0
    assert not x.values("uq_model_info", **labels)  # it is not served
    assert not x.values("uq_labeled_predictions_total", model="tiny", version="unused")
