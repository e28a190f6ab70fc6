"""The application behind a real server: stock OIP clients, plain HTTP, labels, limits."""

from __future__ import annotations

import concurrent.futures
import json
import re
import shutil
import socket
import time

import numpy as np
import orjson
import pytest
import tritonclient.http as triton

from calibration.predictor import Predictor
from posthoc.contract import BundleError
from service.models import find_bundles, load_models
from tests.factory import CLASSES, rows


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


def as_rows(x, names="abcd"):
    return [dict(zip(names, row, strict=True)) for row in x.tolist()]


def healthy(server):
    answer = server.client.post("/v1/predict", json={"rows": as_rows(np.zeros((1, 4)))})
    return answer.status_code == 200


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


def poll(ask, wanted, seconds=30):
    deadline = time.monotonic() + seconds
    while not wanted(value := ask()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert wanted(value), value
    return value


def test_labels_find_their_predictions(served):
    server = served()
    x, y = rows("classification", 60, 9)
    got = server.client.post("/v1/predict", json={"rows": as_rows(x), "id": "batch"}).json()
    right = [p["label"] == CLASSES[t] for p, t in zip(got["predictions"], y, strict=True)]

    def label(k, value):
        return server.client.post("/v1/labels", json={"id": f"batch:{k}", "label": value})

    poll(
        lambda: server.client.get("/v1/calibration").json(),
        lambda c: c["models"][0]["served"] == 60,
    )
    first = label(0, int(y[0]))
    assert first.json()["results"] == [{"id": "batch:0", "result": "accepted"}]
    assert label(0, CLASSES[y[0]]).json()["counts"] == {"duplicate": 1}
    conflict = label(0, int((y[0] + 1) % 3))
    assert conflict.status_code == 409
    assert conflict.json()["counts"] == {"conflict": 1}
    assert label("nobody", 0).status_code == 202
    lines = b"\n".join(
        orjson.dumps({"id": f"batch:{k}", "label": CLASSES[y[k]], "model": "tiny"})
        for k in range(1, 60)
    )
    bulk = server.client.post(
        "/v1/labels", content=lines, headers={"content-type": "application/x-ndjson"}
    )
    assert bulk.json()["counts"] == {"accepted": 59}

    def live():
        (model,) = server.client.get("/v1/calibration").json()["models"]
        return model

    model = poll(live, lambda m: m["labelled"] == 60)
    assert model["accuracy"] == pytest.approx(np.mean(right))
    covered = [CLASSES[t] in p["set"] for p, t in zip(got["predictions"], y, strict=True)]
    assert model["coverage"]["0.9"]["coverage"] == pytest.approx(np.mean(covered))
    text = server.client.get("/metrics").text
    metrics = re.findall(r'^uq_labeled_correct_total\{.*model="tiny".*\} (\S+)$', text, re.M)
    assert sum(map(float, metrics)) >= sum(right)
    gone = server.client.delete("/v1/predictions/batch:0")
    assert gone.status_code == 200
    assert live()["labelled"] == 59


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"id": "a"}, "'label' is missing"),
        ({"label": 1}, "'id'"),
        ({"id": "a b", "label": 1}, "'id'"),
        ({"id": "a", "label": 3}, "3"),
        ({"id": "a", "label": True}, "True"),
        ({"id": "a", "label": "z"}, "'z'"),
        ({"id": "a", "label": None}, "None"),
        ({"id": "a", "label": 1, "weight": 2}, "'weight'"),
        ([{"id": "a", "label": 1}, 5], "label 1 is a JSON number"),
        ([], "no label"),
    ],
)
def test_labels_that_cannot_be_right(server, body, says):
    answer = server.client.post("/v1/labels", json=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_random_addresses_leave_the_metrics_as_they_were(server):
    rng = np.random.default_rng(0)
    for method in ("GET", "POST", "DELETE", "BREW"):
        server.client.request(method, "/nowhere", headers={"content-type": "application/json"})
    server.client.get("/metrics")
    before = len(server.client.get("/metrics").text.splitlines())
    for k in range(300):
        noise = rng.bytes(6).hex()
        server.client.request(
            ["GET", "POST", "DELETE", "BREW"][k % 4],
            f"/{noise}/{k}",
            headers={"content-type": "application/json"},
        )
    assert len(server.client.get("/metrics").text.splitlines()) == before


def test_health_and_pages(server):
    assert server.client.get("/livez").json() == {"live": True}
    assert server.client.get("/readyz").json() == {"ready": True}
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


def test_a_damaged_bundle_is_not_served(classifier, tmp_path):
    copy = tmp_path / "root" / "tiny" / "1"
    shutil.copytree(classifier, copy)
    assert find_bundles(tmp_path / "root") == {"tiny": copy}
    assert list(load_models(tmp_path / "root", device="cpu", threads=1)) == ["tiny"]
    copy.parent.rename(tmp_path / "root" / "small")
    with pytest.raises(BundleError, match="'tiny' and lies in the folder of 'small'"):
        load_models(tmp_path / "root", device="cpu", threads=1)
    (tmp_path / "root" / "small" / "1" / "head.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"head\.onnx was changed"):
        load_models(tmp_path / "root", device="cpu", threads=1)


def test_the_live_version_is_named(classifier, tmp_path):
    for version in ("1", "2"):
        shutil.copytree(classifier, tmp_path / "tiny" / version)
    with pytest.raises(BundleError, match="2 versions"):
        find_bundles(tmp_path)
    active = tmp_path / "tiny" / "active.json"
    active.write_text('{"version": "2"}')
    assert find_bundles(tmp_path) == {"tiny": tmp_path / "tiny" / "2"}
    for text, says in (("[]", "must be"), ("{", "must be"), ('{"version": "3"}', "'3'")):
        active.write_text(text)
        with pytest.raises(BundleError, match=says):
            find_bundles(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="no bundle"):
        find_bundles(tmp_path / "empty")
    with pytest.raises(BundleError, match="no such folder"):
        find_bundles(tmp_path / "nothing")
