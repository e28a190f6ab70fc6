"""Models without a linear head, and heads that the user names."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from scipy.special import softmax

from posthoc.contract import ModelError
from posthoc.frozen import expose, open_frozen
from tests.posthoc.networks import (
    AXES,
    BODY,
    HEAD,
    LOGITS,
    PHI,
    TAILS,
    WEIGHTS,
    D,
    K,
    W,
    X,
    check_exposed,
    model,
    node,
    run,
    value,
)

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
    "MatMul 'attention' has no constant float weight": [
        *BODY,
        node("Unsqueeze", ["phi", "last"], ["column"]),
        node("MatMul", ["x", "w3"], ["other"]),
        node("Unsqueeze", ["other", "axis"], ["row"]),
        node("MatMul", ["column", "row"], ["y3"], name="attention"),
        node("Flatten", ["y3"], ["y"]),
    ],
    "Gather": [
        node("Cast", ["x"], ["index"], to=TensorProto.BOOL),
        node("Cast", ["index"], ["i"], to=TensorProto.INT64),
        node("Gather", ["w3", "i"], ["rows"]),
        node("Flatten", ["rows"], ["y"]),
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


def test_a_head_that_keeps_an_axis_of_features_apart_is_not_taken():
    """Two positions with K/2 outputs each, flattened: no D×K matrix gives them."""
    nodes = [
        *BODY,
        node("Reshape", ["phi", "halves"], ["phi3"]),
        node("MatMul", ["phi3", "w4"], ["z3"]),
        node("Flatten", ["z3"], ["z"]),
        node("Softmax", ["z"], ["y"]),
    ]
    extra = {"halves": np.array([0, 2, 3]), "w4": W[:3, :2].copy()}
    f = open_frozen(model(nodes, extra=extra), task="classification")
    halves = PHI.reshape(-1, 2, 3) @ W[:3, :2]
    check_exposed(f, None, halves.reshape(-1, 4))
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
