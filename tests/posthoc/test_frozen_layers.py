"""Last layers in the forms that exporters write: convolutions, features with more axes, layers
before a choice of positions, normalised outputs."""

import numpy as np
import onnx
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
    B,
    C,
    D,
    K,
    W,
    X,
    check_exposed,
    model,
    node,
    run,
)

MAPS = {"one": np.array([1]), "map": np.array([-1, 6, 1, 1]), "flat": np.array([-1, 4]), **AXES}
KERNEL = np.ascontiguousarray(W.T)[:, :, None, None]


def wide(n=16, t=3):
    """A few positions with features each, N×T×C, from inputs N×T×D."""
    return np.random.default_rng(5).normal(size=(n, t, D)).astype(np.float32)


LAYERS = {
    "conv_1x1": [
        node("Reshape", ["phi", "map"], ["phi4"]),
        node("Conv", ["phi4", "kernel", "b2"], ["z4"], name="head"),
        node("Reshape", ["z4", "flat"], ["z"]),
    ],
    "conv_1x1_without_a_bias": [
        node("Reshape", ["phi", "map"], ["phi4"]),
        node("Conv", ["phi4", "kernel"], ["m4"], name="head", kernel_shape=[1, 1]),
        node("Add", ["m4", "b4"], ["z4"]),
        node("Squeeze", ["z4", "maps"], ["z"]),
    ],
    "conv_1d": [
        node("Unsqueeze", ["phi", "last"], ["phi3"]),
        node("Conv", ["phi3", "kernel1", "b2"], ["z3"], name="head"),
        node("Flatten", ["z3"], ["z"]),
    ],
    "conv_that_covers_its_map": [
        node("Reshape", ["phi", "by_two"], ["phi4"]),
        node("Conv", ["phi4", "kernel23", "b2"], ["z4"], name="head"),
        node("Flatten", ["z4"], ["z"]),
    ],
    "conv_then_channels_last": [
        node("Reshape", ["phi", "map"], ["phi4"]),
        node("Conv", ["phi4", "kernel", "b2"], ["z4"], name="head"),
        node("Transpose", ["z4"], ["zt"], perm=[0, 2, 3, 1]),
        node("Reshape", ["zt", "flat"], ["z"]),
    ],
    "an_axis_of_one": [
        node("Unsqueeze", ["phi", "one"], ["phi3"]),
        node("MatMul", ["phi3", "w2"], ["m3"], name="head"),
        node("Add", ["m3", "b2"], ["z3"]),
        node("Squeeze", ["z3", "one"], ["z"]),
    ],
    "batch_norm_of_nothing": [
        node("Gemm", ["phi", "w2", "b2"], ["g"], name="head"),
        node("BatchNormalization", ["g", "gamma", "beta", "mean", "variance"], ["z"], epsilon=0.0),
    ],
}
EXTRA = {
    **MAPS,
    "kernel": KERNEL,
    "kernel1": KERNEL[..., 0],
    "kernel23": np.ascontiguousarray(W.T).reshape(K, 1, 2, 3),
    "by_two": np.array([-1, 1, 2, 3]),
    "maps": np.array([2, 3]),
    "b4": B[None, :, None, None],
    "gamma": np.ones(K, np.float32),
    "beta": np.zeros(K, np.float32),
    "mean": np.zeros(K, np.float32),
    "variance": np.ones(K, np.float32),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_form_of_the_last_layer_is_found(layer):
    data = model([*BODY, *LAYERS[layer], node("Softmax", ["z"], ["y"])], extra=EXTRA)
    f = open_frozen(data, task="classification")
    assert f.head_node == "head" and f.notes == () and f.tail[0] == "Softmax"
    np.testing.assert_allclose(f.head.weight, W.T, rtol=1e-6)
    np.testing.assert_allclose(f.head.bias, B, rtol=1e-6, atol=1e-7)
    check_exposed(f, PHI, LOGITS)
    # The user may name it too.
    named = open_frozen(data, task="classification", head="head")
    assert named.head_node == "head"
    check_exposed(named, PHI, LOGITS)


def test_a_normalisation_of_the_outputs_is_folded_into_the_head():
    gamma, beta, mean, variance = np.random.default_rng(2).uniform(0.5, 2, (4, K)).astype("f4")
    nodes = [
        *BODY,
        node("Gemm", ["phi", "w2", "b2"], ["g"], name="head"),
        node("BatchNormalization", ["g", "gamma", "beta", "mean", "variance"], ["z"]),
    ]
    extra = {"gamma": gamma, "beta": beta, "mean": mean, "variance": variance}
    f = open_frozen(model(nodes, ("z",), extra=extra), task="classification")
    check_exposed(f, PHI, gamma * (LOGITS - mean) / np.sqrt(variance + 1e-5) + beta)


POSITIONS = {
    "the first of each row": (
        [node("Gather", ["z3", "zero"], ["z"], axis=1)],
        lambda a: a[:, 0],
    ),
    "a mean": (
        [node("ReduceMean", ["z3"], ["z"], axes=[1], keepdims=0)],
        lambda a: a.mean(1),
    ),
    "a slice": (
        [
            node("Slice", ["z3", "starts", "ends", "axes"], ["s"]),
            node("Squeeze", ["s", "one"], ["z"]),
        ],
        lambda a: a[:, 2],
    ),
    "a mean, then scaled": (
        [
            node("ReduceMean", ["z3"], ["r"], axes=[1], keepdims=1),
            node("Mul", ["r", "two"], ["r2"]),
            node("Squeeze", ["r2", "one"], ["z"]),
        ],
        lambda a: 2 * a.mean(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", POSITIONS)
def test_a_layer_before_a_choice_of_positions_acts_on_the_chosen_features(what):
    """As language models classify: a score for each token, of which the last (or mean) counts."""
    nodes, choose = POSITIONS[what]
    data = model(
        [
            *BODY,
            node("MatMul", ["phi", "w2"], ["m"], name="score"),
            node("Add", ["m", "b2"], ["z3"]),
            *nodes,
            node("Softmax", ["z"], ["y"]),
        ],
        inputs=[("x", TensorProto.FLOAT, ["N", 3, D])],
        extra={**MAPS, "zero": np.array(0), "starts": np.array([2]), "ends": np.array([3]),
               "axes": np.array([1]), "two": np.float32(2)},
    )  # fmt: skip
    x = wide()
    w1 = np.asarray(onnx.numpy_helper.to_array(onnx.load_from_string(data).graph.initializer[0]))
    phi = np.tanh(x.astype(np.float64) @ w1)
    z = choose(phi @ W.astype(np.float64) + B)
    features = phi.mean(1) if "mean" in what else choose(phi)
    for head in (None, "score"):
        f = open_frozen(data, task="classification", head=head)
        assert f.head_node == "score" and f.notes == ()
        check_exposed(f, features, z, {"x": x})


def test_a_global_pool_behind_a_convolution_of_every_pixel():
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(C, 2, 3, 3)).astype(np.float32)
    data = model(
        [
            node("Conv", ["x", "body"], ["h"]),
            node("Relu", ["h"], ["maps"]),
            node("Conv", ["maps", "kernel", "b2"], ["z4"], name="head"),
            node("GlobalAveragePool", ["z4"], ["p4"]),
            node("Flatten", ["p4"], ["z"]),
            node("Softmax", ["z"], ["y"]),
        ],
        extra={"body": kernel, "kernel": KERNEL},
        inputs=[("x", TensorProto.FLOAT, ["N", 2, 6, 6])],
    )
    f = open_frozen(data, task="classification")
    x = {"x": rng.normal(size=(5, 2, 6, 6)).astype(np.float32)}
    maps = run(with_output(data, "maps"), ["maps"], x)[0]
    phi = maps.astype(np.float64).mean((2, 3))
    assert f.head_node == "head" and f.notes == ()
    check_exposed(f, phi, phi @ W + B, x)


def with_output(data, name):
    proto = onnx.load_from_string(data)
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return proto.SerializeToString()


def test_a_choice_that_the_features_do_not_allow_leaves_a_black_box():
    """Every second class: the same choice takes every second feature, not the outputs' own."""
    nodes = [*BODY, *HEAD, node("Slice", ["z", "starts", "ends", "last", "steps"], ["y"])]
    extra = {
        **AXES, "starts": np.array([0]), "ends": np.array([K]), "steps": np.array([2])
    }  # fmt: skip
    f = open_frozen(model(nodes, extra=extra), task="classification")
    check_exposed(f, None, LOGITS[:, ::2])
    assert "not N×D" in f.notes[0] or "cannot be taken" in f.notes[0]


def test_a_softmax_over_the_channels_of_one_pixel():
    """Probabilities N×C×1×1, flattened last: z is what the softmax saw, as N×C."""
    nodes = [
        *BODY,
        node("Reshape", ["phi", "map"], ["phi4"]),
        node("Conv", ["phi4", "kernel", "b2"], ["z4"], name="head"),
        node("Softmax", ["z4"], ["p4"], axis=1),
        node("Flatten", ["p4"], ["y"]),
    ]
    f = open_frozen(model(nodes, extra=EXTRA), task="classification")
    assert f.tail == ("Flatten", "Softmax") and f.notes == () and not f.z_is_probs
    check_exposed(f, PHI, LOGITS)


def test_outputs_written_with_the_rows_last_and_turned_round():
    """The innermost tensor of z's values has the rows in axis 1 and cannot be z."""
    for classes in (K, 8, 1):
        rng = np.random.default_rng(0)
        w = rng.normal(size=(classes, C)).astype(np.float32)
        nodes = [
            *BODY,
            node("Transpose", ["phi"], ["columns"]),
            node("MatMul", ["w", "columns"], ["zt"]),
            node("Transpose", ["zt"], ["y"], perm=[1, 0]),
        ]
        f = open_frozen(model(nodes, extra={"w": w}), task="regression")
        check_exposed(f, None, PHI @ w.T)
        assert f.z == "y" and f.z_dim == classes


def test_a_convolution_with_a_border_or_in_groups_is_no_head():
    for attributes in ({"pads": [1, 1, 1, 1]}, {"group": 2}):
        groups = attributes.get("group", 1)
        size = 3 if "pads" in attributes else 1
        kernel = np.random.default_rng(0).normal(size=(K, C // groups, size, size))
        nodes = [
            *BODY,
            node("Reshape", ["phi", "map"], ["phi4"]),
            node("Conv", ["phi4", "kernel"], ["z4"], **attributes),
            node("Flatten", ["z4"], ["z"]),
            node("Softmax", ["z"], ["y"]),
        ]
        extra = {**MAPS, "kernel": kernel.astype(np.float32)}
        f = open_frozen(model(nodes, extra=extra), task="classification")
        assert f.phi is None and "not fully connected" in f.notes[0]


def test_integer_masks_that_make_nan_are_not_what_a_model_is_checked_on():
    """Embeddings under an additive mask, written as (1 − mask)·(−3e38): NaN beyond 0 and 1."""
    rng = np.random.default_rng(3)
    extra = {
        **AXES,
        "one": np.array([1]),
        "unit": np.float32(1),
        "low": np.float32(-3.0e38),
        "table": rng.normal(size=(11, C)).astype("f4"),
    }
    nodes = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("Cast", ["mask"], ["m0"], to=1),
        node("Sub", ["unit", "m0"], ["m1"]),
        node("Mul", ["m1", "low"], ["m2"]),
        node("Softmax", ["m2"], ["weights"]),
        node("Unsqueeze", ["weights", "last"], ["m3"]),
        node("Mul", ["rows", "m3"], ["weighted"]),
        node("ReduceSum", ["weighted", "one"], ["phi"], keepdims=0),
        *HEAD,
        node("Softmax", ["z"], ["y"]),
    ]
    inputs = [("ids", TensorProto.INT64, ["N", "T"]), ("mask", TensorProto.INT64, ["N", "T"])]
    f = open_frozen(model(nodes, extra=extra, inputs=inputs), task="classification")
    assert (f.phi, f.head_node, f.notes) == ("phi", "head", ())


def test_real_rows_are_asked_for_where_random_ones_do_not_run():
    nodes = [node("Gather", ["table", "ids"], ["phi"]), *HEAD, node("Softmax", ["z"], ["y"])]
    table = np.random.default_rng(0).normal(size=(1, C)).astype(np.float32)
    data = model(nodes, extra={"table": table}, inputs=[("ids", TensorProto.INT64, ["N"])])
    asked = []

    def real(specs):
        asked.append([s.name for s in specs])
        return {"ids": np.zeros(9, np.int64)}

    f = open_frozen(data, task="classification", sample=real)
    assert f.head_node == "head" and asked == [["ids"]]
    with pytest.raises(ModelError, match="does not run on a batch of 9 real rows"):
        open_frozen(data, task="classification", sample=lambda s: {"ids": np.ones(9, np.int64)})
    # Where random rows will do, nobody is asked.
    plain = model([*BODY, *HEAD, node("Softmax", ["z"], ["y"])])
    assert open_frozen(plain, task="classification", sample=real).phi == "phi"
    assert len(asked) == 1 and run(plain, None, {"x": X})[0].shape == (16, K)
