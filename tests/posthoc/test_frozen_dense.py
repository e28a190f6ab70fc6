"""Models of maps: z and φ against a convolution done pixel by pixel, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from scipy.special import expit, log_softmax, softmax

from posthoc.contract import ModelError, Task
from posthoc.frozen import Frozen, expose, open_frozen
from posthoc.pixels import Layout, pixels
from tests.posthoc.dense_nets import BODY, CONV, LAST_BODY, dense_model, images, looped, node

INT = {"types": {"y": TensorProto.INT64}}
LAST: dict[str, Any] = {"last": True}
TURN = node("Transpose", ["z"], ["t"], perm=[0, 2, 3, 1])
TURNED = node("Transpose", ["z"], ["y"], perm=[0, 2, 3, 1])
TOKENS = [
    *BODY,
    node("Transpose", ["phi"], ["p2"], perm=[0, 2, 3, 1]),
    node("Reshape", ["p2", "tokens"], ["p3"]),
    node("MatMul", ["p3", "m2"], ["m"]),
]
MATRIX = [
    node("Transpose", ["phi"], ["p2"], perm=[0, 2, 3, 1]),
    node("MatMul", ["p2", "m2"], ["m"]),
]
SIZE_OF_X = [
    node("Shape", ["x"], ["xs"]),
    node("Slice", ["xs", "two", "four"], ["hw"]),
    node("Concat", ["four_first", "hw"], ["sh"], axis=0),
]
EXTRA = {
    "tokens": np.array([0, -1, 5]),
    "flat": np.array([0, 4, -1]),
    "flat_last": np.array([0, -1, 4]),
    "two": np.array([2]),
    "four": np.array([4]),
    "four_first": np.array([-1, 4]),
    "one": np.array([1]),
    "half": np.float32(0.5),
    "twice": np.float32(2.0),
    "scale": np.array([1, 1, 2, 2], np.float32),
    "w3": np.random.default_rng(3).normal(size=(4, 5, 3, 3)).astype(np.float32),
}


@dataclass(frozen=True)
class Net:
    """A network and what should be found: axes of z, of the output and of φ (0: a black box), the
    number of spatial axes, and the channels."""

    nodes: list[Any]
    axis: int | None
    out_axis: int | None
    phi_axis: int | None
    spatial: int = 2
    classes: int = 4
    task: Task = "classification"
    how: dict[str, Any] = field(default_factory=dict)


NETS = {
    "N×C×H×W": Net([*BODY, *CONV, node("Identity", ["z"], ["y"])], 1, 1, 1),
    "softmax": Net([*BODY, *CONV, node("Softmax", ["z"], ["y"], axis=1)], 1, 1, 1),
    "log-softmax": Net([*BODY, *CONV, node("LogSoftmax", ["z"], ["y"], axis=1)], 1, 1, 1),
    "argmax": Net([*BODY, *CONV, node("ArgMax", ["z"], ["y"], axis=1, keepdims=0)],
                  1, None, 1, how=INT),
    "argmax, axis kept": Net([*BODY, *CONV, node("ArgMax", ["z"], ["y"], axis=1, keepdims=1)],
                             1, 1, 1, how=INT),
    "argmax of softmax, axis kept": Net(
        [*BODY, *CONV, node("Softmax", ["z"], ["p"], axis=1),
         node("ArgMax", ["p"], ["y"], axis=1, keepdims=1)], 1, 1, 1, how=INT),
    "channels last": Net([*LAST_BODY, *CONV, TURNED], 1, -1, 1, how=LAST),
    "channels last, softmax": Net(
        [*LAST_BODY, *CONV, TURN, node("Softmax", ["t"], ["y"], axis=-1)], 1, -1, 1, how=LAST),
    "channels last, argmax kept": Net(
        [*LAST_BODY, *CONV, TURN, node("ArgMax", ["t"], ["y"], axis=-1, keepdims=1)],
        1, -1, 1, how=LAST | INT),
    "channels last, a matrix": Net(
        [*LAST_BODY, *MATRIX, node("Add", ["m", "b2"], ["y"])], -1, -1, -1, how=LAST),
    "softmax over turned axes": Net(
        [*BODY, *CONV, TURN, node("Softmax", ["t"], ["s"], axis=-1),
         node("Transpose", ["s"], ["y"], perm=[0, 3, 1, 2])], 1, 1, 1),
    "a matrix, channels first": Net(
        [*BODY, *MATRIX, node("Add", ["m", "b2"], ["a"]),
         node("Transpose", ["a"], ["y"], perm=[0, 3, 1, 2])], -1, 1, -1),
    "tokens": Net([*TOKENS, node("Add", ["m", "b2"], ["y"])], -1, -1, -1, spatial=1),
    "tokens to a map": Net(
        [*TOKENS, node("Add", ["m", "b2"], ["a"]), node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
         *SIZE_OF_X, node("Reshape", ["b", "sh"], ["y"])], 1, 1, -1),
    "N×C×(HW)": Net([*BODY, *CONV, node("Reshape", ["z", "flat"], ["y"])], 1, 1, 1, spatial=1),
    "N×C×(HW), softmax before": Net(
        [*BODY, *CONV, node("Softmax", ["z"], ["r"], axis=1),
         node("Reshape", ["r", "flat"], ["y"])],
        1, 1, 1, spatial=1),
    "N×C×(HW), softmax after": Net(
        [*BODY, *CONV, node("Reshape", ["z", "flat"], ["r"]),
         node("Softmax", ["r"], ["y"], axis=1)],
        1, 1, 1, spatial=1),
    "N×(HW)×C": Net([*BODY, *CONV, TURN, node("Reshape", ["t", "flat_last"], ["y"])],
                    1, -1, 1, spatial=1),
    "sigmoid N×1×H×W": Net([*BODY, *CONV, node("Sigmoid", ["z"], ["y"])], 1, 1, 1, classes=1),
    "sigmoid N×H×W": Net(
        [*BODY, *CONV, node("Squeeze", ["z", "one"], ["q"]), node("Sigmoid", ["q"], ["y"])],
        1, None, 1, classes=1),
    "sigmoid N×H×W×1": Net([*LAST_BODY, *CONV, TURN, node("Sigmoid", ["t"], ["y"])],
                           1, -1, 1, classes=1, how=LAST),
    "one logit": Net([*BODY, *CONV, node("Identity", ["z"], ["y"])], 1, 1, 1, classes=1),
    "values N×H×W": Net([*BODY, *CONV, node("Squeeze", ["z", "one"], ["y"])],
                        1, None, 1, classes=1, task="regression"),
    "values N×3×H×W": Net([*BODY, *CONV, node("Identity", ["z"], ["y"])],
                          1, 1, 1, classes=3, task="regression"),
    "values N×H×W×3": Net([*LAST_BODY, *CONV, TURNED], 1, -1, 1, classes=3, task="regression",
                          how=LAST),
    "half precision": Net([*BODY, *CONV, node("Softmax", ["z"], ["y"], axis=1)], 1, 1, 1,
                          how={"dtype": TensorProto.FLOAT16}),
    "two outputs": Net(
        [*BODY, *CONV, node("Softmax", ["z"], ["y"], axis=1), node("Identity", ["z"], ["l"])],
        1, 1, 1, how={"outputs": ("y", "l")}),
    "labels cast to bytes": Net(
        [*BODY, *CONV, node("ArgMax", ["z"], ["a"], axis=1, keepdims=0),
         node("Cast", ["a"], ["y"], to=TensorProto.UINT8)],
        1, None, 1, how={"types": {"y": TensorProto.UINT8}}),
}  # fmt: skip


def opened(net: Net, size: tuple[Any, ...], **more: Any) -> Frozen:
    how = {"extra": EXTRA, **net.how, **more}
    model = dense_model(net.nodes, classes=net.classes, size=size, **how)
    return open_frozen(model, task=net.task)


def run(frozen: Frozen, x: np.ndarray, names: list[str | None]) -> list[np.ndarray]:
    session = ort.InferenceSession(expose(frozen), providers=["CPUExecutionProvider"])
    kind = {"float16": np.float16}.get(frozen.inputs[0].dtype, np.float32)
    turned = np.moveaxis(x, 1, -1) if frozen.inputs[0].shape[-1] == 2 else x
    return [np.asarray(v) for v in session.run(names, {"x": turned.astype(kind)})]


# H, W and C all different, all four alike (in more than one way), and sizes that are free.
SIZES: list[tuple[tuple[Any, ...], tuple[int, int]]] = [
    (("H", "W"), (6, 7)),
    ((6, 7), (6, 7)),
    ((4, 4), (4, 4)),
    ((5, 5), (5, 5)),
    ((3, 4), (3, 4)),
]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "×".join(map(str, s[0])))
@pytest.mark.parametrize("name", NETS)
def test_z_and_features_of_every_pixel_are_found(name: str, size: Any) -> None:
    net, (declared, real) = NETS[name], size
    frozen = opened(net, declared)
    layout = frozen.dense
    assert layout is not None and frozen.head is not None and not frozen.z_is_probs
    assert (layout.axis, layout.out_axis, layout.phi_axis) == (net.axis, net.out_axis, net.phi_axis)
    assert frozen.z_dim == net.classes and frozen.width == 5
    free = isinstance(declared[0], str)
    flat = (-1,) if free else (real[0] * real[1],)
    assert (
        layout.spatial == ((-1, -1) if free else real if net.spatial == 2 else flat)[-net.spatial :]
    )
    x = images(3, *real)
    phi, z = (v.reshape(3, real[0] * real[1], -1) for v in looped(x, net.classes))
    got_z, got_phi, own = run(frozen, x, [frozen.z, frozen.phi, "y"])
    tolerance = 2e-2 if frozen.inputs[0].dtype == "float16" else 1e-5
    np.testing.assert_allclose(pixels(got_z, layout.axis), z, atol=tolerance)
    np.testing.assert_allclose(pixels(got_phi, layout.phi_axis), phi, atol=tolerance)
    made = pixels(got_phi, layout.phi_axis) @ frozen.head.weight.T + frozen.head.bias
    np.testing.assert_allclose(made, z, atol=tolerance)
    # The model's own output is where the layout says, and untouched.
    np.testing.assert_allclose(pixels(own, layout.out_axis), linked(net, z), atol=tolerance)


def linked(net: Net, z: np.ndarray) -> np.ndarray:
    """What the operators behind z make of it, over its last axis."""
    kinds = {n.op_type for n in net.nodes}
    if "ArgMax" in kinds:
        return np.asarray(z.argmax(2)[..., None])
    if "Softmax" in kinds:
        return np.asarray(softmax(z, 2))
    if "LogSoftmax" in kinds:
        return np.asarray(log_softmax(z, 2))
    return np.asarray(expit(z)) if "Sigmoid" in kinds else z


BOXES = {
    "stride": ([*BODY, node("Conv", ["phi", "w2", "b2"], ["y"], strides=[2, 2])], 1, "64 pixels"),
    "kernel 3": ([*BODY, node("Conv", ["phi", "w3"], ["y"], pads=[1, 1, 1, 1])], 1, "fully"),
    "kernel 3, padded by name": (
        [*BODY, node("Conv", ["phi", "w3"], ["y"], auto_pad="SAME_UPPER")], 1, "45 columns"),
    "pixel shuffle": ([*BODY, *CONV, node("DepthToSpace", ["z"], ["y"], blocksize=2)], 1,
                      "DepthToSpace"),
    "upsampled logits": (
        [*BODY, *CONV, node("Resize", ["z", "", "scale"], ["r"], mode="linear"),
         node("Softmax", ["r"], ["y"], axis=1)], 1, "Resize"),
    "channels last": ([*LAST_BODY, *CONV, TURN, node("Tanh", ["t"], ["y"])], -1, "Tanh"),
    "probabilities, channels last": (
        [*LAST_BODY, *CONV, TURN, node("Softmax", ["t"], ["u"], axis=-1),
         node("Mul", ["u", "twice"], ["v"]), node("Mul", ["v", "half"], ["y"])], -1, "Softmax"),
    "rows and columns exchanged": (
        [*BODY, *CONV, node("Transpose", ["z"], ["y"], perm=[0, 1, 3, 2])], 1, "differs"),
}  # fmt: skip


@pytest.mark.parametrize("size", [("H", "W"), (8, 8)], ids=["free", "fixed"])
@pytest.mark.parametrize("name", BOXES)
def test_what_is_no_layer_of_each_pixel_is_a_black_box(name: str, size: Any) -> None:
    """z is the output (or what a softmax is taken of), and its channels are where they are."""
    nodes, axis, why = BOXES[name]
    last = "last" in name
    frozen = open_frozen(
        dense_model(nodes, classes=4, size=size, last=last, extra=EXTRA), task="classification"
    )
    assert frozen.phi is None and frozen.head is None and frozen.dense is not None
    assert any(why in n for n in frozen.notes if "black box" in n), frozen.notes
    assert (frozen.dense.axis, frozen.dense.out_axis) == (axis, axis)
    assert frozen.z_dim == (1 if name == "pixel shuffle" else 4)
    assert frozen.z_is_probs == name.startswith("prob")
    x = images(2, 8, 8)
    z, own = run(frozen, x, [frozen.z, "y"])
    if name == "upsampled logits":
        z = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(z, own, rtol=1e-5)


def test_pixels_of_a_shuffle_in_plain_operators_are_not_mismatched() -> None:
    """Reshape, transpose, reshape: the layer's numbers, but other pixels."""
    nodes = [
        *BODY,
        *CONV,
        node("Reshape", ["z", "six"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[0, 1, 4, 2, 5, 3]),
        node("Reshape", ["b", "back"], ["y"]),
    ]
    extra = {"six": np.array([0, 1, 2, 2, 6, 7]), "back": np.array([0, 1, 12, 14])}
    frozen = open_frozen(dense_model(nodes, classes=4, size=(6, 7), extra=extra), task="regression")
    assert frozen.head is None and frozen.z_dim == 1 and frozen.dense is not None
    assert frozen.dense.spatial == (12, 14)
    z, own = run(frozen, images(2, 6, 7), [frozen.z, "y"])
    np.testing.assert_array_equal(z.reshape(own.shape), own)


@pytest.mark.parametrize("what", ["flipped", "cropped"])
def test_a_choice_of_positions_is_applied_to_the_features(what: str) -> None:
    cut = {
        "flipped": (np.array([-1]), np.array([-100]), np.array([3]), np.array([-1])),
        "cropped": (np.array([1]), np.array([5]), np.array([3]), np.array([1])),
    }[what]
    nodes = [*BODY, *CONV, node("Slice", ["z", *"abcd"], ["y"])]
    frozen = open_frozen(
        dense_model(nodes, classes=4, size=(6, 7), extra=dict(zip("abcd", cut, strict=True))),
        task="classification",
    )
    assert frozen.head is not None and frozen.dense is not None
    x = images(2, 6, 7)
    phi, z = looped(x, 4)
    moved = slice(None, None, -1) if what == "flipped" else slice(1, 5)
    got_phi, got_z = run(frozen, x, [frozen.phi, frozen.z])
    want = phi[:, :, moved].reshape(2, -1, 5)
    np.testing.assert_allclose(pixels(got_phi, frozen.dense.phi_axis), want, atol=1e-5)
    want = z[:, :, moved].reshape(2, -1, 4)
    np.testing.assert_allclose(pixels(got_z, frozen.dense.axis), want, atol=1e-5)


def test_a_bias_that_depends_on_the_place_is_no_bias_of_the_head() -> None:
    """Four columns and four classes: the constant broadcasts over the wrong axis."""
    nodes = [*BODY, *CONV, node("Add", ["z", "place"], ["y"])]
    extra = {"place": np.arange(4, dtype=np.float32)}
    frozen = open_frozen(
        dense_model(nodes, classes=4, size=(6, 4), extra=extra), task="classification"
    )
    assert frozen.head is None


@pytest.mark.parametrize(
    ("nodes", "task", "classes", "last", "want"),
    [
        ([*LAST_BODY, *CONV, TURN, node("Tanh", ["t"], ["y"])], "regression", 3, True, -1),
        ([*BODY, *CONV, node("Tanh", ["z"], ["y"])], "regression", 3, False, 1),
        ([*BODY, *CONV, node("Tanh", ["z"], ["y"])], "regression", 1, False, 1),
        ([*LAST_BODY, *CONV, TURN, node("Tanh", ["t"], ["y"])], "regression", 1, True, -1),
        (
            [*BODY, *CONV, node("Squeeze", ["z", "one"], ["q"]), node("Tanh", ["q"], ["y"])],
            "regression",
            1,
            False,
            None,
        ),
        (
            [*BODY, *CONV, node("Tanh", ["z"], ["q"]), node("Squeeze", ["q", "one"], ["r"]),
             node("Sigmoid", ["r"], ["y"])],
            "classification",
            1,
            False,
            None,
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [("H", "W"), (6, 7)], ids=["free", "fixed"])
def test_channels_of_a_black_box_are_where_its_sizes_say(
    nodes: Any, task: Task, classes: int, last: bool, want: int | None, size: Any
) -> None:
    frozen = open_frozen(
        dense_model(nodes, classes=classes, size=size, last=last, extra=EXTRA), task=task
    )
    assert frozen.dense is not None and frozen.head is None
    assert frozen.dense.out_axis == want and frozen.z_dim == classes


def test_a_sigmoid_that_says_never_is_still_a_sigmoid() -> None:
    """A text detector on noise: probabilities near 1e-7, which its kernel has to within as much."""
    nodes = [*BODY, *CONV, node("Sub", ["z", "far"], ["s"]), node("Sigmoid", ["s"], ["y"])]
    model = dense_model(nodes, classes=1, size=(6, 7), extra={"far": np.array([19], np.float32)})
    frozen = open_frozen(model, task="classification")
    assert frozen.z == "s" and frozen.head is not None and not frozen.z_is_probs


def test_several_labels_a_pixel_are_refused() -> None:
    for size in (("H", "W"), (6, 7)):
        nodes = [*BODY, *CONV, node("Sigmoid", ["z"], ["y"])]
        with pytest.raises(ModelError, match="sigmoid over 4 labels: multi-label"):
            open_frozen(dense_model(nodes, classes=4, size=size), task="classification")


def test_a_map_of_integers_made_by_nothing_known_is_refused() -> None:
    nodes = [*BODY, *CONV, node("Cast", ["z"], ["y"], to=TensorProto.INT64)]
    with pytest.raises(ModelError, match=r"int64 maps of shape \(4, 6, 7\).*--output"):
        open_frozen(dense_model(nodes, classes=4, size=(6, 7), **INT), task="classification")


@pytest.mark.parametrize("tail", ["Identity", "Softmax"])
def test_a_pooled_map_is_a_row(tail: str) -> None:
    """N×C×1×1 of known size is N×C: a classifier of images, as some leave it."""
    attributes = {"axis": 1} if tail == "Softmax" else {}
    nodes = [
        *BODY,
        node("GlobalAveragePool", ["phi"], ["g"]),
        node("Conv", ["g", "w2", "b2"], ["z"]),
        node(tail, ["z"], ["y"], **attributes),
    ]
    frozen = open_frozen(dense_model(nodes, classes=4, size=("H", "W")), task="classification")
    assert frozen.dense is None and frozen.z_dim == 4 and frozen.head is not None
    x = images(3, 6, 7)
    z, phi = run(frozen, x, [frozen.z, frozen.phi])
    features = looped(x, 4)[0].mean((1, 2))
    np.testing.assert_allclose(phi, features, atol=1e-5)
    np.testing.assert_allclose(z, features @ frozen.head.weight.T + frozen.head.bias, atol=1e-5)


def test_a_named_head_is_found_and_a_wrong_one_is_refused() -> None:
    nodes = [*BODY, *CONV, node("Softmax", ["z"], ["y"], axis=1)]
    model = dense_model(nodes, classes=4, size=(6, 7))
    assert open_frozen(model, task="classification", head="head").head_node == "head"
    with pytest.raises(ModelError, match="not a linear layer"):
        open_frozen(model, task="classification", head="phi")


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_sequence_of_one_value_each_is_dense(outputs: int) -> None:
    """N×T×1 with a free T: a value for each step, and not T values."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(3, 5)).astype(np.float32),
        "v": rng.normal(size=(5, outputs)).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            node("MatMul", ["x", "w"], ["h"]),
            node("Tanh", ["h"], ["phi"]),
            node("MatMul", ["phi", "v"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "T", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "T", outputs])],
        [helper.make_tensor(k, 1, v.shape, v.ravel()) for k, v in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    frozen = open_frozen(made.SerializeToString(), task="regression")
    assert frozen.dense == Layout(-1, -1, (-1,), -1) and frozen.z_dim == outputs
