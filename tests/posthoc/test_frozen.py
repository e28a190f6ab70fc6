"""open_frozen on small models whose weights are known: heads, tails and outputs."""

import hashlib

import numpy as np
import pytest
from onnx import TensorProto

from posthoc.contract import ModelError
from posthoc.frozen import open_frozen
from tests.posthoc.networks import (
    AXES,
    BODY,
    HEAD,
    LOGITS,
    PHI,
    TAILS,
    WEIGHTS,
    C,
    K,
    check_exposed,
    model,
    node,
    run,
    value,
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
