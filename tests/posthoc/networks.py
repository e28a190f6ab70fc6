"""A small network whose weights are known, in any shape of ONNX graph."""

from functools import cache

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from scipy.special import log_softmax, softmax

from posthoc.frozen import Frozen, expose

D, C, K = 5, 6, 4  # inputs, features, classes
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w1": RNG.normal(size=(D, C)).astype(np.float32),
    "w2": RNG.normal(size=(C, K)).astype(np.float32),
    "b2": RNG.normal(size=K).astype(np.float32),
}
X = np.random.default_rng(1).normal(size=(16, D)).astype(np.float32)
node = helper.make_node
W, B = WEIGHTS["w2"], WEIGHTS["b2"]
PHI = np.tanh(X.astype(np.float64) @ WEIGHTS["w1"])
LOGITS = PHI @ WEIGHTS["w2"] + WEIGHTS["b2"]

BODY = [node("MatMul", ["x", "w1"], ["h"]), node("Tanh", ["h"], ["phi"])]
HEAD = [node("MatMul", ["phi", "w2"], ["m"], name="head"), node("Add", ["m", "b2"], ["z"])]


def value(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def model(
    nodes,
    outputs=("y",),
    *,
    opset=17,
    extra=None,
    inputs=(("x", TensorProto.FLOAT, ["N", D]),),
    types=None,
    shapes=None,
    functions=(),
    **kwargs,
):
    """Serialised model; ``extra`` are further constants, ``types`` and ``shapes`` of outputs."""
    constants = {**WEIGHTS, **(extra or {})}
    used = {i for n in nodes for i in n.input}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [
            helper.make_tensor_value_info(
                o, (types or {}).get(o, TensorProto.FLOAT), (shapes or {}).get(o, ["N", None])
            )
            for o in outputs
        ],
        [value(k, v) for k, v in constants.items() if k in used],
    )
    opsets = [helper.make_opsetid("", opset), *kwargs.pop("opsets", [])]
    made = helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=kwargs.pop("ir_version", 8),
        functions=list(functions),
    )
    return made.SerializeToString()


@cache
def products_overflow():
    """Whether ONNX Runtime adds products of bytes in 16 bits here, as on processors with AVX2 and
    no VNNI: then a model whose weights use all eight bits has other answers than it says."""
    a, b = np.full((1, 64), 255, np.uint8), np.full((64, 1), 127, np.int8)
    graph = helper.make_graph(
        [node("MatMulInteger", ["a", "b"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 1])],
        [value("a", a), value("b", b)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return run(made.SerializeToString(), ["y"], {})[0].item() != 64 * 255 * 127


def run(data, outputs=None, feed=None):
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(outputs, {"x": X} if feed is None else feed)


def check_exposed(frozen: Frozen, phi, z, feed=None):
    """φ and z of the exposed graph are what they should be; its own outputs stay bit-equal."""
    names = [s.name for s in frozen.outputs]
    exposed = expose(frozen)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(run(exposed, names, feed), run(frozen.model, names, feed), strict=True)
    )
    [got] = run(exposed, [frozen.z], feed)
    assert got.dtype == np.float32 and got.shape == (len(z), frozen.z_dim)
    np.testing.assert_allclose(got, z, rtol=1e-5, atol=1e-5)
    if phi is None:
        assert frozen.phi is None and frozen.head is None and frozen.head_node is None
        assert any("black box" in n for n in frozen.notes)
        return
    [features] = run(exposed, [frozen.phi], feed)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, phi, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        features @ frozen.head.weight.T + frozen.head.bias, z, rtol=1e-4, atol=1e-4
    )


AXES = {
    "last": np.array([-1]),
    "axis": np.array([1]),
    "shape": np.array([0, -1]),
    "zero": np.float32(-np.inf),
}
SHIFTED = [
    node("ReduceMax", ["z"], ["mx"], axes=[-1], keepdims=0),
    node("Max", ["zero", "mx"], ["mx1"]),
    node("Unsqueeze", ["mx1", "last"], ["mx2"]),
    node("Sub", ["z", "mx2"], ["sh"]),
    node("Exp", ["sh"], ["e"]),
    node("ReduceSum", ["e", "last"], ["s"], keepdims=1),
]
TAILS = {
    "none": ([node("Identity", ["z"], ["y"])], ("Identity",), LOGITS),
    "softmax": ([node("Softmax", ["z"], ["y"])], ("Softmax",), softmax(LOGITS, 1)),
    "log_softmax": ([node("LogSoftmax", ["z"], ["y"])], ("LogSoftmax",), log_softmax(LOGITS, 1)),
    "log_of_softmax": (
        [node("Softmax", ["z"], ["p"]), node("Log", ["p"], ["y"])],
        ("Log", "Softmax"),
        log_softmax(LOGITS, 1),
    ),
    "shapes": (
        [node("Flatten", ["z"], ["a"]), node("Unsqueeze", ["a", "last"], ["b"]),
         node("Squeeze", ["b", "last"], ["c"]), node("Cast", ["c"], ["d"], to=11),
         node("Softmax", ["d"], ["e"]), node("Cast", ["e"], ["f"], to=1),
         node("Reshape", ["f", "shape"], ["g"]), node("Dropout", ["g"], ["y"])],
        ("Dropout", "Reshape", "Cast", "Softmax", "Cast", "Squeeze", "Unsqueeze", "Flatten"),
        softmax(LOGITS, 1),
    ),
    "decomposed": (
        [*SHIFTED, node("Div", ["e", "s"], ["y"])], ("Softmax",), softmax(LOGITS, 1)
    ),
    "decomposed_unshifted": (
        [node("Exp", ["z"], ["e"]), SHIFTED[-1], node("Div", ["e", "s"], ["y"])],
        ("Softmax",),
        softmax(LOGITS, 1),
    ),
    "decomposed_log": (
        [*SHIFTED, node("Log", ["s"], ["l"]), node("Sub", ["sh", "l"], ["y"])],
        ("LogSoftmax",),
        log_softmax(LOGITS, 1),
    ),
    "log_sum_exp": (
        [node("ReduceLogSumExp", ["z"], ["l"], axes=[1]), node("Sub", ["z", "l"], ["y"])],
        ("LogSoftmax",),
        log_softmax(LOGITS, 1),
    ),
}  # fmt: skip
