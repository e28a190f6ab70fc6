"""open_frozen on small models whose weights are known, and on magika."""

import dataclasses
import hashlib
import re
from importlib.metadata import files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy.special import log_softmax, softmax

from posthoc.contract import ModelError
from posthoc.frozen import Frozen, expose, open_frozen

D, C, K = 5, 6, 4  # inputs, features, classes
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w1": RNG.normal(size=(D, C)).astype(np.float32),
    "w2": RNG.normal(size=(C, K)).astype(np.float32),
    "b2": RNG.normal(size=K).astype(np.float32),
}
X = np.random.default_rng(1).normal(size=(16, D)).astype(np.float32)
node = helper.make_node
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


def run(data, outputs=None, feed=None):
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(outputs, feed or {"x": X})


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


# ---- heads

W, B = WEIGHTS["w2"], WEIGHTS["b2"]
HEADS = {
    "matmul_add": (HEAD, {}, W, B),
    "add_matmul": ([HEAD[0], node("Add", ["b2", "m"], ["z"])], {}, W, B),
    "row_bias": (HEAD, {"b2": B[None]}, W, B),
    "matmul": ([node("MatMul", ["phi", "w2"], ["z"], name="head")], {}, W, 0 * B),
    "gemm": ([node("Gemm", ["phi", "w2", "b2"], ["z"], name="head")], {}, W, B),
    "gemm_no_bias": ([node("Gemm", ["phi", "w2"], ["z"], name="head")], {}, W, 0 * B),
    "gemm_scalar_bias": (
        [node("Gemm", ["phi", "w2", "b2"], ["z"], name="head")],
        {"b2": np.float32(0.5)},
        W,
        0 * B + 0.5,
    ),
    "gemm_trans_alpha_beta": (
        [node("Gemm", ["phi", "wt", "b2"], ["z"], name="head", transB=1, alpha=0.5, beta=2.0)],
        {"wt": W.T.copy()},
        0.5 * W,
        2 * B,
    ),
    "constant_node": (
        [node("Constant", [], ["c"], value=value("c", W)),
         node("MatMul", ["phi", "c"], ["z"], name="head")],
        {},
        W,
        0 * B,
    ),
    "transposed": (
        [node("Transpose", ["wt"], ["t"], perm=[1, 0]), node("Identity", ["t"], ["i"]),
         node("MatMul", ["phi", "i"], ["m"], name="head"), HEAD[1]],
        {"wt": W.T.copy()},
        W,
        B,
    ),
    "reshaped": (
        [node("Reshape", ["flat", "shape"], ["t"]), node("Reshape", ["b3", "row"], ["b"]),
         node("MatMul", ["phi", "t"], ["m"], name="head"), node("Add", ["m", "b"], ["z"])],
        {"flat": W.ravel(), "shape": np.array([C, K]), "b3": B[None], "row": np.array([K])},
        W,
        B,
    ),
    "stored_as_float64": (
        [node("Cast", ["wd"], ["t"], to=1),
         node("MatMul", ["phi", "t"], ["m"], name="head"), HEAD[1]],
        {"wd": W.astype(np.float64)},
        W,
        B,
    ),
    "scaled_and_shifted": (
        [*HEAD[:1], node("Add", ["m", "b2"], ["a"]), node("Mul", ["s", "a"], ["b"]),
         node("Sub", ["b", "t"], ["c"]), node("Div", ["c", "u"], ["d"]),
         node("Sub", ["t", "d"], ["z"])],
        {"s": np.float32(3), "t": np.array([1, 2, 3, 4], "f4"), "u": np.float32(2)},
        -1.5 * W,
        np.array([1, 2, 3, 4]) - (3 * B - np.array([1, 2, 3, 4])) / 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("opset", [13, 15, 17, 20])
@pytest.mark.parametrize("kind", HEADS)
def test_every_form_of_a_linear_head_gives_its_weight_and_bias(kind, opset):
    nodes, extra, weight, bias = HEADS[kind]
    data = model([*BODY, *nodes, node("Softmax", ["z"], ["y"])], opset=opset, extra=extra)
    f = open_frozen(data, task="classification")
    assert (f.phi, f.z, f.head_node, f.z_dim, f.opset) == ("phi", "z", "head", K, opset)
    assert (f.tail, f.notes, f.z_is_probs, f.output) == (("Softmax",), (), False, "y")
    np.testing.assert_allclose(f.head.weight, weight.T, rtol=1e-6)
    np.testing.assert_allclose(f.head.bias, bias, rtol=1e-6, atol=1e-7)
    assert f.head.weight.dtype == f.head.bias.dtype == np.float64
    assert f.model == data and f.size == len(data)
    assert f.sha256 == hashlib.sha256(data).hexdigest()
    check_exposed(f, PHI, PHI @ weight + bias)


def test_a_weight_vector_is_one_output():
    w = WEIGHTS["w2"][:, 0]
    data = model([*BODY, node("MatMul", ["phi", "w"], ["y"])], extra={"w": w}, shapes={"y": ["N"]})
    f = open_frozen(data, task="regression")
    assert f.z_dim == 1 and f.head.weight.shape == (1, C)
    check_exposed(f, PHI, (PHI @ w)[:, None])
    assert f.sha256 == hashlib.sha256(data).hexdigest()


# ---- tails

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


@pytest.mark.parametrize("tail", TAILS)
def test_the_walk_back_ends_at_the_logits(tail):
    nodes, operators, want = TAILS[tail]
    data = model([*BODY, *HEAD, *nodes], extra=AXES)
    np.testing.assert_allclose(run(data)[0], want, rtol=1e-4, atol=1e-5)
    f = open_frozen(data, task="classification")
    assert (f.tail, f.head_node, f.z_is_probs, f.notes) == (operators, "head", False, ())
    check_exposed(f, PHI, LOGITS)


def test_a_label_alone_still_leads_to_the_logits():
    data = model(
        [*BODY, *HEAD, node("ArgMax", ["z"], ["y"], axis=1, keepdims=0)],
        types={"y": TensorProto.INT64},
        shapes={"y": ["N"]},
    )
    f = open_frozen(data, task="classification")
    assert (f.z, f.tail) == ("z", ("ArgMax",))
    check_exposed(f, PHI, LOGITS)


def test_a_temperature_in_the_graph_is_folded_into_the_head():
    nodes = [node("Div", ["z", "t"], ["zt"]), node("Softmax", ["zt"], ["y"])]
    f = open_frozen(
        model([*BODY, *HEAD, *nodes], extra={"t": np.float32(2)}), task="classification"
    )
    assert f.z == "zt"
    check_exposed(f, PHI, LOGITS / 2)


def test_one_sigmoid_logit_is_exposed_as_one_output():
    extra = {"w2": W[:, :1], "b2": B[:1]}
    data = model([*BODY, *HEAD, node("Sigmoid", ["z"], ["y"])], extra=extra)
    f = open_frozen(data, task="classification")
    assert (f.z_dim, f.tail) == (1, ("Sigmoid",))
    check_exposed(f, PHI, LOGITS[:, :1])


def test_several_sigmoids_are_refused_as_multi_label():
    with pytest.raises(ModelError, match="multi-label"):
        open_frozen(model([*BODY, *HEAD, node("Sigmoid", ["z"], ["y"])]), task="classification")


# ---- outputs

THREE = [
    *BODY,
    *HEAD,
    node("Softmax", ["z"], ["y"]),
    node("ArgMax", ["z"], ["label"], axis=1, keepdims=0),
]


def test_logits_probabilities_and_label_are_one_output():
    data = model(
        THREE, ("label", "y", "z"), types={"label": TensorProto.INT64}, shapes={"label": ["N"]}
    )
    f = open_frozen(data, task="classification")
    assert [s.name for s in f.outputs] == ["label", "y", "z"]
    assert f.z == "z" and f.head_node == "head"
    check_exposed(f, PHI, LOGITS)


def test_outputs_that_differ_must_be_chosen_from():
    data = model([*THREE, node("Relu", ["phi"], ["r"])], ("y", "r"))
    with pytest.raises(ModelError, match="outputs y, r; choose one with --output"):
        open_frozen(data, task="classification")
    assert open_frozen(data, task="classification", output="y").z == "z"
    with pytest.raises(ModelError, match="no output 'q'; it has y, r"):
        open_frozen(data, task="classification", output="q")


# ---- regression


@pytest.mark.parametrize("squeezed", [False, True])
def test_a_regression_in_units_of_the_target(squeezed):
    """Output = 3 (φ w + b) + 7, as (N, 1) or squeezed to (N)."""
    nodes = [
        *BODY,
        *HEAD,
        node("Mul", ["z", "scale"], ["s"]),
        node("Add", ["s", "mean"], ["m1"]),
        node(*("Squeeze", ["m1", "last"], ["y"]) if squeezed else ("Identity", ["m1"], ["y"])),
    ]
    extra = {"w2": W[:, :1], "b2": B[:1], "scale": np.float32(3), "mean": np.float32(7), **AXES}
    shapes = {"y": ["N"] if squeezed else ["N", 1]}
    f = open_frozen(model(nodes, extra=extra, shapes=shapes), task="regression")
    assert f.z_dim == 1 and f.z == "m1" and f.notes == ()
    check_exposed(f, PHI, 3 * LOGITS[:, :1] + 7)


def test_a_regression_keeps_what_follows_its_last_layer():
    data = model([*BODY, *HEAD, node("Sigmoid", ["z"], ["y"])])
    f = open_frozen(data, task="regression")
    assert f.z == "y" and f.tail == () and not f.z_is_probs
    check_exposed(f, None, 1 / (1 + np.exp(-LOGITS)))
    assert "Sigmoid" in f.notes[0]


# ---- black boxes


def branch(name, nodes):
    out = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", K])
    return helper.make_graph(nodes, name, [], [out])


BLACK = {
    "Relu": [*BODY, *HEAD, node("Relu", ["z"], ["y"])],
    "Add": [*BODY, *HEAD, node("MatMul", ["x", "w3"], ["r"]), node("Add", ["z", "r"], ["y"])],
    "MatMul": [
        *BODY,
        node("Unsqueeze", ["phi", "axis"], ["row"]),
        node("Unsqueeze", ["phi", "last"], ["column"]),
        node("MatMul", ["column", "row"], ["outer"]),
        node("Flatten", ["outer"], ["y"]),
    ],
    "MatMul 'int8' has no constant float weight": [
        *BODY,
        node("DequantizeLinear", ["q", "scale"], ["w"]),
        node("MatMul", ["phi", "w"], ["y"], name="int8"),
    ],
    "If": [
        node("If", ["yes"], ["y"], then_branch=branch("t", [
            *BODY, HEAD[0], node("Add", ["m", "b2"], ["t"])]),
            else_branch=branch("e", [node("MatMul", ["x", "w3"], ["e"])])),
    ],
}  # fmt: skip


@pytest.mark.parametrize("why", BLACK)
def test_a_model_without_a_linear_head_is_a_black_box_that_says_why(why):
    extra = {"w3": np.ones((D, K), np.float32), "yes": np.array(True), **AXES}
    extra |= {"q": np.round(W / 0.02).astype(np.int8), "scale": np.float32(0.02)}
    if why == "If":
        extra |= WEIGHTS
        proto = onnx.load_from_string(model(BLACK[why], extra=extra))
        have = {t.name for t in proto.graph.initializer}
        proto.graph.initializer.extend(value(k, v) for k, v in extra.items() if k not in have)
        data = proto.SerializeToString()
    else:
        data = model(BLACK[why], extra=extra)
    f = open_frozen(data, task="classification")
    assert f.z == "y" and not f.z_is_probs
    check_exposed(f, None, run(data)[0])
    assert re.search(f"no linear head: (the outputs come from )?{why}", f.notes[0])


def test_a_linear_classifier_of_scikit_learns_converter_is_a_black_box_of_probabilities():
    """Label and probabilities from the operators of ai.onnx.ml; only the floats are followed."""
    nodes = [
        node(
            "LinearClassifier",
            ["x"],
            ["label", "scores"],
            domain="ai.onnx.ml",
            coefficients=WEIGHTS["w1"][:, :3].T.ravel().tolist(),
            intercepts=[0.1, 0.2, 0.3],
            classlabels_ints=[0, 1, 2],
            post_transform="SOFTMAX",
            multi_class=1,
        ),
        node("Normalizer", ["scores"], ["y"], domain="ai.onnx.ml", norm="L1"),
    ]
    data = model(
        nodes,
        ("label", "y"),
        types={"label": TensorProto.INT64},
        shapes={"label": ["N"]},
        opsets=[helper.make_opsetid("ai.onnx.ml", 1)],
    )
    f = open_frozen(data, task="classification")
    assert (f.output, f.z, f.z_dim, f.z_is_probs) == ("y", "y", 3, True)
    check_exposed(f, None, softmax(X @ WEIGHTS["w1"][:, :3] + [0.1, 0.2, 0.3], 1))
    [bare] = run(data, ["y"])
    np.testing.assert_allclose(run(expose(f), [f.z])[0], bare)


def test_dynamic_quantisation_is_noted_not_refused():
    """Its scale is taken over the whole batch, so that rows move each other a little."""
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xr"]),
        node("MatMul", ["xr", "w1"], ["h"]),
        node("Tanh", ["h"], ["phi"]),
        *HEAD,
        node("Softmax", ["z"], ["y"]),
    ]
    f = open_frozen(model(nodes), task="classification")
    assert f.head_node == "head" and "moves by up to" in f.notes[0]


def test_probabilities_without_logits_say_so():
    nodes = [
        *BODY,
        *HEAD,
        node("Abs", ["z"], ["a"]),
        node("ReduceSum", ["a", "last"], ["s"]),
        node("Div", ["a", "s"], ["y"]),
    ]
    f = open_frozen(model(nodes, extra=AXES), task="classification")
    assert f.z == "y" and f.z_is_probs and f.z_dim == K
    assert any("probabilities" in n for n in f.notes)
    check_exposed(f, None, np.abs(LOGITS) / np.abs(LOGITS).sum(1, keepdims=True))


def test_a_tail_that_only_looks_like_a_softmax_is_not_believed():
    """Softmax over pairs of classes: the pattern is there, softmax(z) is not the output."""
    nodes = [
        *BODY,
        *HEAD,
        node("Reshape", ["z", "pairs"], ["z2"]),
        node("Softmax", ["z2"], ["p2"]),
        node("Reshape", ["p2", "shape"], ["y"]),
    ]
    extra = {"pairs": np.array([-1, 2, 2]), "shape": np.array([-1, K])}
    data = model(nodes, extra=extra)
    f = open_frozen(data, task="classification")
    assert f.z == "y" and f.tail == () and "did not check" in f.notes[0]
    check_exposed(f, None, run(data)[0])


def test_a_head_on_features_with_more_axes_is_not_taken():
    nodes = [
        *BODY,
        node("Unsqueeze", ["phi", "one"], ["phi3"]),
        node("MatMul", ["phi3", "w2"], ["z3"]),
        node("Squeeze", ["z3", "one"], ["z"]),
        node("Softmax", ["z"], ["y"]),
    ]
    f = open_frozen(model(nodes, extra={"one": np.array([1])}), task="classification")
    check_exposed(f, None, PHI @ W)
    assert "not N×D" in f.notes[0]


# ---- the head that the user names


def test_a_named_head_behind_a_tail_that_the_walk_cannot_pass():
    """softmax(z) written as a ratio with Pow: unknown to the walk, verified by running."""
    nodes = [
        *BODY,
        *HEAD,
        node("Pow", ["euler", "z"], ["e"]),
        node("ReduceSum", ["e", "last"], ["s"]),
        node("Div", ["e", "s"], ["y"]),
    ]
    data = model(nodes, extra={**AXES, "euler": np.float32(np.e)})
    alone = open_frozen(data, task="classification")
    assert alone.phi is None and alone.z_is_probs
    for head in ("head", "m"):
        f = open_frozen(data, task="classification", head=head)
        assert (f.z, f.tail, f.head_node) == ("z", ("Softmax",), "head")
        check_exposed(f, PHI, LOGITS)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ("nowhere", "no node 'nowhere'"),
        ("phi", "'phi' is not a linear layer: the outputs come from Tanh"),
        ("h", "neither the result of 'h' nor its softmax"),
    ],
)
def test_a_head_that_cannot_be_one_says_why(head, why):
    with pytest.raises(ModelError, match=why):
        open_frozen(model([*BODY, *HEAD, TAILS["softmax"][0][0]]), task="classification", head=head)


# ---- inputs


def test_several_inputs_free_axes_and_a_mask():
    """Mean of a sequence of embeddings under a mask; free length, integer and bool inputs."""
    rng = np.random.default_rng(3)
    nodes = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("Cast", ["mask"], ["m0"], to=1),
        node("Unsqueeze", ["m0", "last"], ["m1"]),
        node("Mul", ["rows", "m1"], ["masked"]),
        node("ReduceSum", ["masked", "one"], ["phi"], keepdims=0),
        *HEAD,
        node("Softmax", ["z"], ["y"]),
    ]
    data = model(
        nodes,
        extra={"table": rng.normal(size=(11, C)).astype("f4"), "one": np.array([1]), **AXES},
        inputs=[("ids", TensorProto.INT64, ["N", "T"]), ("mask", TensorProto.BOOL, ["N", "T"])],
    )
    f = open_frozen(data, task="classification")
    assert [(s.dtype, s.shape) for s in f.inputs] == [("int64", (-1, -1)), ("bool", (-1, -1))]
    assert (f.phi, f.head_node) == ("phi", "head")


def test_rows_that_random_ones_cannot_stand_for_are_given():
    nodes = [
        node("Gather", ["table", "ids"], ["phi"]),
        *HEAD,
        node("Softmax", ["z"], ["y"]),
    ]
    data = model(nodes, extra={"table": np.ones((1, C), np.float32)}, inputs=[("ids", 7, ["N"])])
    with pytest.raises(ModelError, match="does not run on a batch of 8 random rows"):
        open_frozen(data, task="classification")
    f = open_frozen(data, task="classification", sample={"ids": np.zeros(3, np.int64)})
    assert f.head_node == "head"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_are_exposed_as_float32(dtype):
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    data = model(
        [*BODY, *HEAD, node("Softmax", ["z"], ["y"])],
        extra={k: v.astype(dtype) for k, v in WEIGHTS.items()},
        inputs=[("x", code, ["N", D])],
        types={"y": code},
    )
    f = open_frozen(data, task="classification")
    x = {"x": X.astype(dtype)}
    phi, z = run(expose(f), [f.phi, f.z], x)
    assert phi.dtype == z.dtype == np.float32
    np.testing.assert_allclose(z, LOGITS, atol=0.05 if dtype == np.float16 else 1e-5)
    assert f.size == len(data) and f.sha256 == hashlib.sha256(data).hexdigest()


REFUSED = {
    "a fixed batch": (
        {"nodes": [*BODY, *HEAD], "inputs": [("x", 1, [1, D])], "outputs": ["z"]},
        "input 'x' has 1 rows in its first axis; export the model with a dynamic batch",
    ),
    "a scalar input": (
        {
            "nodes": [*BODY, *HEAD, node("Mul", ["z", "k"], ["y"])],
            "inputs": [("x", 1, ["N", D]), ("k", 1, [])],
        },
        "input 'k' has no rows",
    ),
    "text": (
        {
            "nodes": [node("StringNormalizer", ["x"], ["y"])],
            "inputs": [("x", TensorProto.STRING, ["N"])],
            "types": {"y": TensorProto.STRING},
            "shapes": {"y": ["N"]},
        },
        "input 'x' takes text",
    ),
    "rows that meet": (
        {
            "nodes": [
                node("ReduceMean", ["x"], ["c"], axes=[0]),
                node("Sub", ["x", "c"], ["xc"]),
                node("MatMul", ["xc", "w1"], ["y"]),
            ]
        },
        "changes with the rows beside it",
    ),
    "a random operator": (
        {
            "nodes": [
                *BODY,
                node("RandomNormalLike", ["phi"], ["r"]),
                node("Add", ["phi", "r"], ["y"]),
            ]
        },
        "from run to run",
    ),
    "a hard-wired batch": (
        {
            "nodes": [*BODY, *HEAD, node("Reshape", ["z", "shape"], ["y"])],
            "extra": {"shape": np.array([1, K])},
        },
        "does not run on a batch of 8",
    ),
    "a sum over rows": (
        {
            "nodes": [*BODY, node("ReduceSum", ["phi", "zero"], ["y"])],
            "extra": {"zero": np.array([0])},
            "shapes": {"y": [1, C]},
        },
        "axis 0 must be N",
    ),
    "dense outputs": (
        {
            "nodes": [*BODY, node("Unsqueeze", ["phi", "a"], ["p"]), node("Exp", ["p"], ["y"])],
            "extra": {"a": np.array([1, 2])},
            "shapes": {"y": ["N", 1, 1, C]},
        },
        r"of shape \(8, 1, 1, 6\); classification takes one row of floats",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_row_by_row_is_refused(what):
    kwargs, why = REFUSED[what]
    with pytest.raises(ModelError, match=why):
        open_frozen(model(**kwargs), task="classification")


# ---- files


def test_old_opsets_are_converted_and_unchanged():
    nodes = [*BODY, *HEAD, node("Softmax", ["z"], ["y"], axis=1)]
    for opset in (7, 9, 11, 12):
        data = model(nodes, opset=opset, ir_version=6)
        f = open_frozen(data, task="classification")
        assert f.opset == 17 and f.head_node == "head" and "converted" in f.notes[0]
        assert f.sha256 == hashlib.sha256(data).hexdigest() and f.model != data
        np.testing.assert_allclose(run(f.model)[0], run(data)[0], rtol=1e-6)
        check_exposed(f, PHI, LOGITS)


def test_an_opset_that_cannot_be_converted_names_the_operator():
    body = helper.make_graph(
        [node("Identity", ["a"], ["b"])],
        "body",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [C])],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [C])],
    )
    nodes = [
        *BODY,
        node("Unsqueeze", ["phi"], ["one"], axes=[1]),
        node("Scan", ["", "one"], ["two"], num_scan_inputs=1, body=body),
        node("Squeeze", ["two"], ["y"], axes=[1]),
    ]
    with pytest.raises(
        ModelError, match=r"opset 8 cannot be converted to 17 .*operators are .*Scan"
    ):
        open_frozen(model(nodes, opset=8, ir_version=6), task="classification")


def test_a_conversion_that_changes_an_output_is_refused():
    """Hardmax over axis 0 was over all values at once, and is over columns since opset 13."""
    nodes = [*BODY, node("Hardmax", ["phi"], ["y"], axis=0)]
    with pytest.raises(ModelError, match=r"changes output 'y'; .*Hardmax"):
        open_frozen(model(nodes, opset=11, ir_version=6), task="classification")


def test_local_functions_are_opened():
    function = helper.make_function(
        "local",
        "Dense",
        ["p", "w", "b"],
        ["o"],
        [node("MatMul", ["p", "w"], ["mm"]), node("Add", ["mm", "b"], ["o"])],
        [helper.make_opsetid("", 17)],
    )
    data = model(
        [*BODY, node("Dense", ["phi", "w2", "b2"], ["z"], domain="local"),
         node("Softmax", ["z"], ["y"])],
        functions=[function],
        opsets=[helper.make_opsetid("local", 1)],
    )  # fmt: skip
    f = open_frozen(data, task="classification")
    assert f.phi == "phi" and not onnx.load_from_string(f.model).functions
    check_exposed(f, PHI, LOGITS)


def saved_externally(folder: Path) -> Path:
    proto = onnx.load_from_string(model([*BODY, *HEAD, node("Softmax", ["z"], ["y"])]))
    onnx.save(
        proto,
        folder / "m.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return folder / "m.onnx"


def test_external_data_is_read_into_one_file(tmp_path):
    path = saved_externally(tmp_path)
    f = open_frozen(path, task="classification")
    assert f.file == "m.onnx" and f.size == len(f.model)
    assert f.sha256 == hashlib.sha256(f.model).hexdigest()
    (tmp_path / "weights.bin").unlink()
    check_exposed(f, PHI, LOGITS)


@pytest.mark.parametrize(
    "trick", ["parent", "absolute", "link", "folder", "missing", "cut", "bytes"]
)
def test_external_data_comes_only_from_whole_plain_files_beside_the_model(trick, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    path = saved_externally(folder)
    weights = folder / "weights.bin"
    outside = tmp_path / "outside.bin"
    outside.write_bytes(weights.read_bytes())
    proto = onnx.load(path, load_external_data=False)
    places = {"parent": "../outside.bin", "absolute": str(outside)}
    for t in proto.graph.initializer:
        for entry in t.external_data:
            if entry.key == "location":
                entry.value = places.get(trick, "weights.bin")
    path.write_bytes(proto.SerializeToString())
    if trick == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif trick in ("link", "missing", "folder"):
        weights.unlink()
        if trick == "link":
            weights.symlink_to(outside)
        elif trick == "folder":
            weights.mkdir()
    with pytest.raises(ModelError, match=r"weights\.bin|outside\.bin"):
        open_frozen(path.read_bytes() if trick == "bytes" else path, task="classification")


def test_what_is_not_a_model_is_refused_by_name(tmp_path):
    for name, data in (("zero.onnx", b""), ("text.onnx", b"hello world"), ("cut.onnx", None)):
        whole = model([*BODY, *HEAD, node("Softmax", ["z"], ["y"])])
        (tmp_path / name).write_bytes(whole[: len(whole) // 2] if data is None else data)
        with pytest.raises(ModelError, match=name):
            open_frozen(tmp_path / name, task="classification")
    with pytest.raises(ModelError, match=r"missing\.onnx: cannot be read"):
        open_frozen(tmp_path / "missing.onnx", task="classification")


def test_frozen_is_a_value():
    f = open_frozen(model([*BODY, *HEAD, node("Softmax", ["z"], ["y"])]), task="classification")
    with pytest.raises(dataclasses.FrozenInstanceError):
        f.z = "other"


# ---- a real model


def test_magika():
    """A deployed classifier: opset 15, decomposed softmax, int32 input, head MatMul + Add."""
    [path] = [f for f in files("magika") if f.match("*/standard_v3_3/model.onnx")]
    f = open_frozen(path.locate(), task="classification")
    assert f.inputs[0].shape == (-1, 2048) and f.inputs[0].dtype == "int32"
    assert f.head.weight.shape == (214, 512) and f.z_dim == 214 and f.opset == 15
    assert f.head_node.endswith("Dense_1/MatMul") and f.tail == ("Softmax",) and f.notes == ()
    rng = np.random.default_rng(0)
    x = {"bytes": rng.integers(0, 257, (8, 2048)).astype(np.int32)}
    want = run(Path(path.locate()).read_bytes(), ["target_label"], x)[0]
    got, phi, z = run(expose(f), ["target_label", f.phi, f.z], x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(softmax(z, 1), want, atol=1e-6)
    np.testing.assert_allclose(phi @ f.head.weight.T + f.head.bias, z, rtol=1e-4, atol=1e-4)
