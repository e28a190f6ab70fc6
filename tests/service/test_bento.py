"""A real ``bentoml serve``, and a real ``bentoml build``. The first test here is the canary for the
``service_class`` hook: without it BentoML's own application would answer instead of ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib

import numpy as np
import pytest
import tritonclient.http as triton
import yaml

from calibration.predictor import Predictor
from tests.factory import rows
from tests.service.conftest import ROOT, BentoServer

# Runs in every Python process below the test: writes what must never happen to one file.
AUDIT = """
import os, sys
seen = os.open(os.environ["AUDIT_FILE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def audit(event, args):
    if event == "pickle.find_class" or (event == "import" and args[0] in FORBIDDEN):
        os.write(seen, f"{os.getpid()} {event} {args[:2]}\\n".encode())

FORBIDDEN = {"torch", "onnx", "sklearn", "plotly"}
os.write(seen, f"{os.getpid()} watched {sys.argv[:3]}\\n".encode())
sys.addaudithook(audit)
"""


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    (folder / "sitecustomize.py").write_text(AUDIT)
    return folder


@pytest.fixture(scope="module")
def server(classifier, audit, tmp_path_factory):
    with BentoServer(
        tmp_path_factory.mktemp("bento"),
        HEDGED_BUNDLES=str(classifier),
        PYTHONPATH=str(audit),
        AUDIT_FILE=str(audit / "events"),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def x():
    return rows("classification", 5, 11)[0]


@pytest.mark.parametrize("binary", [False, True])
def test_a_stock_client_gets_the_graphs_numbers(server, classifier, x, binary):
    predictor = Predictor(classifier)
    want = predictor.run({"x": x}, outputs=[*predictor.fields, "y"])
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in want]
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        assert client.is_server_ready()
        result = client.infer("tiny", [tensor], outputs=outputs)
    for name, value in want.items():
        np.testing.assert_array_equal(result.as_numpy(name), value)


def test_bentomls_own_client_and_pages_still_work(server, classifier, x):
    want = Predictor(classifier).run({"x": x})
    ask = (
        "import bentoml, json, sys\n"
        "rows = json.load(sys.stdin)\n"
        "with bentoml.SyncHTTPClient(sys.argv[1]) as client:\n"
        "    print(json.dumps(client.predict(rows=rows)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask, f"http://127.0.0.1:{server.port}"],
        input=json.dumps([dict(zip("abcd", row, strict=True)) for row in x.tolist()]),
        env=server.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answers = json.loads(done.stdout)
    confidence = np.array([a["confidence"] for a in answers], np.float32)
    np.testing.assert_array_equal(confidence, want["confidence"])
    assert server.client.get("/schema.json").json()["name"] == "hedged"
    assert "/predict" in server.client.get("/docs.json").json()["paths"]
    bad = server.client.post("/predict", json={"rows": [{"a": 1}]})
    assert bad.status_code == 400
    assert "row 0 has no column" in bad.text


def test_what_a_client_sends_is_bounded_and_the_next_request_works(server, x):
    good = {"inputs": {"x": x.tolist()}}
    headers = {"content-type": "application/json"}

    def post(content):
        return server.client.post("/v1/predict", content=content, headers=headers)

    nan = post(json.dumps({"inputs": {"x": [[0.0] * 4, [float("nan")] * 4]}}))
    assert (nan.status_code, "not JSON" in nan.text) == (400, True)
    large = post(b"x" * 65536 for _ in range(1600))  # 100 MiB
    assert (large.status_code, "larger than 67108864 bytes" in large.text) == (413, True)
    garbage = post(b"{[\x00")
    assert (garbage.status_code, "not JSON" in garbage.text) == (400, True)
    shape = post(json.dumps({"inputs": {"x": [[0.0] * 3]}}))
    assert (shape.status_code, "[N, 4]" in shape.text) == (400, True)
    pickled = server.client.post(
        "/predict", content=b"\x80\x05.", headers={"content-type": "application/vnd.bentoml+pickle"}
    )
    assert pickled.status_code == 415
    row = x.copy()
    row[2, 0] = np.inf
    tensor = triton.InferInput("x", list(row.shape), "FP32")
    tensor.set_data_from_numpy(row)
    with (
        triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
        pytest.raises(triton.InferenceServerException, match="row 2 of input 'x' is not finite"),
    ):
        client.infer("tiny", [tensor])
    assert server.client.post("/v1/predict", json=good).status_code == 200


def test_a_refused_body_is_not_in_the_log(server):
    refused = server.client.post("/predict", json={"rows": "a-patient-called-Quilp"})
    assert refused.status_code == 400
    log = server.log.read_text()
    assert "Exception on /predict [POST]: 1 errors" in log
    assert "Quilp" not in log  # no hex, which ids of requests are made of


def test_unknown_addresses_make_no_series(server):
    rng = np.random.default_rng(0)
    server.client.get("/nowhere")
    server.client.get("/metrics")

    def series():
        text = server.client.get("/metrics").text
        assert "bentoml_service" not in text  # its metrics take raw paths as labels
        return sorted(re.sub(r" \S+$", "", line) for line in text.splitlines())

    before = series()
    for k in range(300):
        server.client.get(f"/{rng.bytes(8).hex()}/{k}")
    assert series() == before


def test_the_worker_loads_no_torch_and_unpickles_nothing(server, audit, x):
    row = dict(zip("abcd", x[0].tolist(), strict=True))
    for path in ("/v1/predict", "/predict"):
        assert server.client.post(path, json={"rows": [row]}).status_code == 200
    raw = server.client.post(
        "/v2/models/tiny/infer",
        content=x.tobytes(),
        headers={"Inference-Header-Content-Length": "0"},
    )
    assert raw.status_code == 200
    events = (audit / "events").read_text().splitlines()
    (worker,) = server.workers()
    assert any(line.startswith(f"{worker.pid} watched") for line in events)
    assert [line for line in events if " watched " not in line] == []


def test_a_damaged_bundle_stops_the_server_at_its_start(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "bundle")
    (tmp_path / "bundle" / "predictor.onnx").write_bytes(b"changed")
    server = BentoServer(tmp_path, HEDGED_BUNDLES=str(tmp_path / "bundle"))
    with pytest.raises(AssertionError, match=r"predictor\.onnx was changed"):
        server.__enter__()
    assert server.process.returncode not in (0, None)


def bentoml(home, *command):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("HEDGED_")}
    environ |= {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
    # A proxy that nobody listens on: whatever asks the network fails.
    environ |= dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "bentoml", *command],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_bento_is_built_offline_and_served(classifier, tmp_path):
    home = tmp_path / "bentoml"
    home.mkdir()
    tag = bentoml(home, "build", ".", "--output", "tag").strip().removeprefix("__tag__:")
    folder = home / "bentos" / tag.replace(":", "/")
    source = {p.relative_to(folder / "src").as_posix() for p in (folder / "src").rglob("*")}
    assert {"service/bento.py", "service/page/index.html", "calibration/bundle.py"} <= source
    assert not any(name.startswith(("tests", ".venv", "bench")) for name in source)
    requirements = (folder / "env/python/requirements.txt").read_text()
    assert "index-url" not in requirements
    assert not re.search(r"\b(torch|onnx|scikit-learn|plotly)\b", requirements)
    bentoml(home, "export", tag, str(tmp_path / "hedged.bento"))
    with tarfile.open(tmp_path / "hedged.bento") as archive:
        assert any(name.endswith("bento.yaml") for name in archive.getnames())
    with BentoServer(tmp_path, tag, HEDGED_BUNDLES=str(classifier)) as server:
        assert server.client.get("/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}


def test_the_bento_asks_for_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bento = yaml.safe_load((ROOT / "bentofile.yaml").read_text())
    assert bento["python"]["packages"] == project["dependencies"]
    assert bento["python"]["lock_packages"] is False
