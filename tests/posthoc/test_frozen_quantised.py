"""Models as ONNX Runtime's own quantiser writes them: static (QDQ and QOperator) and dynamic.

φ is what the quantised layer multiplies, so φ Wᵀ + b is recomputed here in float64 from the
exposed φ; where the result is rounded again it may differ from z by half a step.
"""

import logging

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)
from scipy.special import softmax

from posthoc.frozen import expose, open_frozen
from posthoc.model.quantised import as_float, rounding
from tests.posthoc.networks import BODY, HEAD, B, C, K, W, X, model, node, products_overflow, run

KERNEL = np.ascontiguousarray(W.T)[:, :, None, None]
MAP = [
    node("Reshape", ["phi", "map"], ["phi4"]),
    node("Conv", ["phi4", "kernel", "b2"], ["z4"], name="head", kernel_shape=[1, 1]),
    node("Reshape", ["z4", "flat"], ["z"]),
]
GEMM = [node("Gemm", ["phi", "w2", "b2"], ["z"], name="head")]
LAYERS = {
    "MatMul": ([*BODY, *HEAD], {}),
    "Gemm": ([*BODY, *GEMM], {}),
    "Conv": (
        [*BODY, *MAP],
        {"kernel": KERNEL, "map": np.array([-1, C, 1, 1]), "flat": np.array([-1, K])},
    ),
}
STEP = 2 / 255  # more than a step of probabilities


class Rows(CalibrationDataReader):
    def __init__(self, x):
        self.left = iter([{"x": x}])

    def get_next(self):
        return next(self.left, None)


@pytest.fixture(autouse=True)
def quiet():
    """The quantiser advises through the root logger."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def quantised(folder, layer, how, *, per_channel=False, tail=True):
    """(float model, the same quantised, its weights in all the bits that are computed right)."""
    seven = products_overflow()
    nodes, extra = LAYERS[layer]
    end = [node("Softmax", ["z"], ["y"])] if tail else [node("Identity", ["z"], ["y"])]
    source, out = folder / "float.onnx", folder / "quantised.onnx"
    source.write_bytes(model([*nodes, *end], extra=extra))
    if how == "dynamic":
        quantize_dynamic(source, out, reduce_range=seven)
    else:
        quantize_static(
            source, out, Rows(X), quant_format=how, per_channel=per_channel, reduce_range=seven
        )
    return source.read_bytes(), out.read_bytes()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("how", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["qdq", "qoperator"])
def test_a_statically_quantised_layer_keeps_its_features(tmp_path, layer, how, per_channel):
    plain, data = quantised(tmp_path, layer, how, per_channel=per_channel)
    f = open_frozen(data, task="classification")
    assert f.tail[-1] == "Softmax" or "Softmax" in f.tail
    phi, z, y = run(expose(f), [f.phi, f.z, f.output])
    assert phi.shape == (16, C) and z.shape == (16, K) and phi.dtype == z.dtype == np.float32
    # W and b are the float model's to the precision of eight (or seven) bits, φ and z likewise.
    scale, rough = np.abs(W).max(), 2 if products_overflow() else 1
    np.testing.assert_allclose(f.head.weight, W.T, atol=rough * scale / 127)
    np.testing.assert_allclose(f.head.bias, B, atol=0.02)
    inner = onnx.load_from_string(plain)
    inner.graph.output.extend(onnx.ValueInfoProto(name=n) for n in ("phi", "z"))
    want_phi, want_z = run(inner.SerializeToString(), ["phi", "z"])
    np.testing.assert_allclose(phi, want_phi, atol=0.05 * rough)
    np.testing.assert_allclose(z, want_z, atol=0.2 * rough)
    # z is φ Wᵀ + b to within the step that the note names, inside the range of eight bits.
    note = next(n for n in f.notes if "quantised" in n and "steps of" in n)
    step = float(note.split("steps of ")[1].split(";")[0])
    inside = (z > z.min()) & (z < z.max())
    exact = phi.astype(np.float64) @ f.head.weight.T + f.head.bias
    assert np.abs(exact - z)[inside].max() <= 1.01 * step
    # The output is the softmax of z, rounded to eight bits; the model's own stays within a step.
    np.testing.assert_allclose(y, softmax(z, 1), atol=STEP)
    np.testing.assert_allclose(y, run(data)[0], atol=STEP)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_dynamically_quantised_layer_is_exact_in_the_features_that_it_sees(tmp_path, layer):
    _, data = quantised(tmp_path, layer, "dynamic")
    f = open_frozen(data, task="classification")
    phi, z, y = run(expose(f), [f.phi, f.z, f.output])
    exact = phi.astype(np.float64) @ f.head.weight.T + f.head.bias
    np.testing.assert_allclose(exact, z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, softmax(z, 1), atol=1e-6)
    np.testing.assert_array_equal(y, run(data)[0])
    # Features on the 256 levels of one scale, which the layer itself took over the batch.
    levels = np.unique(phi)
    assert len(levels) <= 256
    np.testing.assert_allclose(f.head.weight, W.T, atol=np.abs(W).max() / 127)


@pytest.mark.parametrize("how", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["qdq", "qoperator"])
def test_a_quantised_regression_keeps_its_features(tmp_path, how):
    _, data = quantised(tmp_path, "Gemm", how, tail=False)
    f = open_frozen(data, task="regression")
    phi, z = run(expose(f), [f.phi, f.z])
    np.testing.assert_array_equal(z, run(data)[0])
    step = np.diff(np.unique(z)).min()
    inside = (z > z.min()) & (z < z.max())
    exact = phi.astype(np.float64) @ f.head.weight.T + f.head.bias
    assert np.abs(exact - z)[inside].max() <= 1.01 * step


def test_weights_alone_may_be_quantised():
    """As weight-only exports write it: the layer is a float one with a dequantised constant."""
    nodes = [
        *BODY,
        node("DequantizeLinear", ["q", "scale"], ["w"], axis=1),
        node("MatMul", ["phi", "w"], ["m"], name="int8"),
        node("Add", ["m", "b2"], ["y"]),
    ]
    scale = (np.abs(W).max(0) / 127).astype(np.float32)
    q = np.rint(W / scale).astype(np.int8)
    data = model(nodes, extra={"q": q, "scale": scale})
    f = open_frozen(data, task="classification")
    assert (f.phi, f.head_node) == ("phi", "int8") and "to within 1 %" in f.notes[0]
    np.testing.assert_allclose(f.head.weight, (q * scale).T, rtol=1e-6)
    phi, z = run(expose(f), [f.phi, f.z])
    exact = phi @ f.head.weight.T + f.head.bias
    np.testing.assert_allclose(z, exact, atol=0.01 * np.abs(exact).max())


def test_the_head_of_a_quantised_model_may_be_named(tmp_path):
    for how in (QuantFormat.QDQ, QuantFormat.QOperator, "dynamic"):
        _, data = quantised(tmp_path, "Gemm", how)
        found = open_frozen(data, task="classification")
        named = open_frozen(data, task="classification", head=found.head_node)
        assert named.head is not None and named.z_dim == K
        np.testing.assert_array_equal(named.head.weight, found.head.weight)


def test_integer_products_without_zero_points():
    """MatMulInteger of a statically quantised input: φ in integers, all scales in W."""
    scales = np.float32(0.02), np.float32(0.01)
    q = np.rint(W / scales[1]).clip(-127, 127).astype(np.int8)
    nodes = [
        *BODY,
        node("QuantizeLinear", ["phi", "sa", "zero"], ["a"]),
        node("MatMulInteger", ["a", "q"], ["i"], name="head"),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["f", "both"], ["z"]),
        node("Softmax", ["z"], ["y"]),
    ]
    extra = {"sa": scales[0], "zero": np.int8(0), "q": q, "both": np.float32(0.0002)}
    f = open_frozen(model(nodes, extra=extra), task="classification")
    assert f.head_node == "head"
    phi, z = run(expose(f), [f.phi, f.z])
    np.testing.assert_array_equal(phi, np.rint(phi))
    np.testing.assert_allclose(phi @ f.head.weight.T, z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(f.head.weight, q.T * 0.0002, rtol=1e-6)


# ---- the reading itself: each quantised operator against ONNX Runtime's kernel

MOST = 63 if products_overflow() else 127
A, WEIGHT = (
    np.random.default_rng(0).integers(0, 256, (7, C)).astype(np.uint8),
    np.random.default_rng(1).integers(-MOST, MOST + 1, (C, K)).astype(np.int8),
)
Q = {
    "a": A,
    "sa": np.float32(0.011),
    "za": np.uint8(120),
    "w": WEIGHT,
    "wt": np.ascontiguousarray(WEIGHT.T),
    "sw": np.float32(0.02),
    "zw": np.int8(3),
    "sy": np.float32(0.15),
    "zy": np.uint8(128),
    "bias": np.array([100, -200, 300, 4000], np.int32),
    "b": np.array([3, 200, 90, 255], np.uint8),
    "small": np.float32(0.05),
    "none": np.uint8(0),
    "fine": np.float32(1 / 256),
}
ONNX, MICROSOFT = "", "com.microsoft"
OPERATORS = {
    "QLinearMatMul": (ONNX, ["a", "sa", "za", "w", "sw", "zw", "sy", "zy"], {}),
    "QGemm": (
        MICROSOFT,
        ["a", "sa", "za", "wt", "sw", "zw", "bias", "sy", "zy"],
        {"transB": 1},
    ),
    "QLinearAdd": (MICROSOFT, ["a", "sa", "za", "a", "small", "none", "sy", "zy"], {}),
    "QLinearSoftmax": (MICROSOFT, ["a", "sa", "za", "fine", "none"], {"axis": -1, "opset": 13}),
    "QLinearSigmoid": (MICROSOFT, ["a", "sa", "za", "fine", "none"], {}),
    "MatMulInteger": (ONNX, ["a", "w", "za", "zw"], {}),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_quantised_operator_is_what_it_is_read_as(kind):
    domain, inputs, attributes = OPERATORS[kind]
    original = helper.make_node(kind, inputs, ["y"], domain=domain, **attributes)
    results = [kernel([original]), kernel(as_float(original))]
    # Integers in the original, the same numbers in float or integers in the reading.
    assert np.abs(results[0].astype(np.float64) - results[1]).max() <= 1


def kernel(nodes):
    used = {i for n in nodes for i in n.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in Q.items() if k in used],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


def test_rounding_is_what_quantising_and_dequantising_does():
    values = np.linspace(-9, 9, 1001).astype(np.float32)
    for scale, zero in ((0.05, np.uint8(100)), (0.03, np.int8(-5)), (0.001, np.int16(7))):
        nodes = [
            node("QuantizeLinear", ["v", "s", "z"], ["q"]),
            node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ]
        data = model(
            nodes,
            extra={"s": np.float32(scale), "z": zero},
            inputs=[("v", TensorProto.FLOAT, ["N"])],
            shapes={"y": ["N"]},
            opset=21,
            ir_version=10,
        )
        [want] = run(data, None, {"v": values})
        found = rounding(np.float32(scale), np.asarray(zero))(values.astype(np.float64))
        np.testing.assert_allclose(found, want, atol=1.001 * scale)
        assert (np.abs(found - want) < 1e-4 * scale + 1e-6).mean() > 0.98  # but for ties
    assert rounding(np.array([1.0, 2.0]), None) is None
    assert rounding(np.float32(0), None) is None
