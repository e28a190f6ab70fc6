"""NaN and infinity in inputs, by policy; answers are strict JSON and finite under both."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import tritonclient.http as triton
from onnx import helper, numpy_helper

from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.predictor import Predictor
from service.errors import ServiceError
from service.inputs import validate
from tests import factory
from tests.factory import CLASSES, COLUMNS, rows


def takes_nan(path):
    """The frozen network of the tests, for which a missing value is 0."""
    model = onnx.load(factory.frozen_model(path))
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    graph.node[0].input[0] = "known"
    graph.node.insert(0, helper.make_node("IsNaN", ["x"], ["missing"]))
    graph.node.insert(1, helper.make_node("Where", ["missing", "zero", "x"], ["known"]))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("missing")
    fit(
        takes_nan(folder / "model.onnx"),
        factory.data(folder / "data.parquet"),
        folder / "bundle",
        FitOptions(task="classification"),
        name="tiny",
        columns=Columns(
            target="target", inputs={"x": COLUMNS["classification"]}, id="id", classes=CLASSES
        ),
        cache_dir=folder / "cache",
    )
    return folder / "bundle"


@pytest.fixture(scope="module")
def x():
    values = rows("classification", 6, 3)[0]
    values[1, 2] = values[4, 0] = np.nan
    return values


def infer(server, values, datatype="FP32"):
    tensor = triton.InferInput("x", list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        return client.infer("tiny", [tensor])


def test_a_model_of_missing_values_is_served(served, bundle, x):
    server = served(bundles=bundle, nonfinite="allow")
    got = infer(server, x)
    want = Predictor(bundle).run({"x": np.nan_to_num(x)})
    for name in ("probs", "label", "set", "ood_pvalue"):
        np.testing.assert_array_equal(got.as_numpy(name), want[name])
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [6, 4],
                                   "data": x.tolist()}]})  # fmt: skip
    literal = server.client.post("/v2/models/tiny/infer", content=body)
    assert (literal.status_code, "not JSON" in literal.text) == (400, True)
    text = server.client.post("/v1/predict", json={"inputs": {"x": np.nan_to_num(x).tolist()}})

    def refuse(name):
        raise AssertionError(name)

    json.loads(text.content, parse_constant=refuse)


def test_null_is_a_missing_value_in_json(served, bundle, x):
    """Strict JSON has no NaN, and tables have holes."""
    holes = [[None if np.isnan(v) else float(v) for v in row] for row in x]
    names = COLUMNS["classification"]
    bodies = {
        "/v2/models/tiny/infer": {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [6, 4], "data": holes}]
        },
        "/v1/predict": {"inputs": {"x": holes}},
        "/v1/models/tiny/predict": {"rows": [dict(zip(names, r, strict=True)) for r in holes]},
    }
    server = served(bundles=bundle, nonfinite="allow")
    wanted = infer(server, x).as_numpy("confidence").tolist()
    for path, body in bodies.items():
        answer = server.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        got = answer.json()
        if path == "/v2/models/tiny/infer":
            found = next(o["data"] for o in got["outputs"] if o["name"] == "confidence")
        else:
            found = [row["confidence"] for row in got["predictions"]]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    described = server.client.get("/openapi.json").json()["components"]["schemas"]
    column = described["PredictRequest.tiny"]["properties"]["rows"]["items"]["properties"]["c"]
    assert column == {"type": ["number", "null"]}
    strict = served(bundles=bundle)
    for path, body in bodies.items():
        refused = strict.client.post(path, json=body)
        assert (refused.status_code, "holds a null" in refused.text) == (400, True)
    described = strict.client.get("/openapi.json").json()["components"]["schemas"]
    column = described["PredictRequest.tiny"]["properties"]["rows"]["items"]["properties"]["c"]
    assert column == {"type": "number"}
    whole = {"inputs": {"x": [[1, 2, 3, True]]}}
    assert server.client.post("/v1/predict", json=whole).status_code == 400


def test_what_a_model_makes_of_nan_never_leaves(served, x):
    """The plain network answers NaN to NaN."""
    server = served(nonfinite="allow")
    with pytest.raises(triton.InferenceServerException, match=r"row 1: the model's .* not finite"):
        infer(server, x)
    assert infer(server, x[:1]).as_numpy("label").shape == (1,)
    with pytest.raises(triton.InferenceServerException, match=r"row 0 .* not finite"):
        infer(server, np.full((1, 4), 1e300), "FP64")  # finite as it was sent


def test_the_default_names_the_row(served, bundle, x):
    with pytest.raises(triton.InferenceServerException, match="row 1 of input 'x' is not finite"):
        infer(served(bundles=bundle), x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_policy_is_for_the_models_own_inputs(bundle, value):
    predictor = Predictor(bundle)
    spec = predictor.inputs[0]
    odd = np.full((2, 4), value, np.float32)
    assert np.array_equal(validate({"x": odd}, [spec], 9, nonfinite=True)["x"], odd, equal_nan=True)
    with pytest.raises(ServiceError, match="row 0 of input 'x' is not finite"):
        validate({"x": odd}, [spec], 9)
    u = type(spec)(name="u", dtype="float32", shape=(-1,))
    with pytest.raises(ServiceError, match="row 0 of input 'u' is not finite"):
        validate({"x": odd, "u": np.full(2, value)}, [spec], 9, [u], nonfinite=True)
