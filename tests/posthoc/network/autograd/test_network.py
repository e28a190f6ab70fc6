"""A graph as a function: hooks, gradients, what is run, what is refused."""

import gc
import weakref

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from posthoc.contract import ModelError
from posthoc.network.autograd import Network, unsupported
from tests.posthoc.network.autograd.graphs import assert_same, graph, node, runtime, tensors

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 3, 6, 6))
STORED = {
    "w1": RNG.normal(size=(4, 3, 3, 3)),
    "b1": RNG.normal(size=4),
    "gamma": RNG.uniform(0.5, 2, 4),
    "beta": RNG.normal(size=4),
    "m": RNG.normal(size=4),
    "v": RNG.uniform(0.5, 2, 4),
    "w2": RNG.normal(size=(4, 3)),
    "b2": RNG.normal(size=3),
}
NODES = [
    node("Conv", ["x", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
    node("BatchNormalization", ["c", "gamma", "beta", "m", "v"], ["n"]),
    node("Gelu", ["n"], ["a"]),
    node("Add", ["a", "n"], ["r"]),  # a second reader of the normalised tensor
    node("GlobalAveragePool", ["r"], ["p"]),
    node("Flatten", ["p"], ["f"]),
    node("Gemm", ["f", "w2", "b2"], ["y"]),
]


def net(dtype=np.float32, nodes=NODES, outputs=("y",)):
    """(model, feed): convolution, batch normalisation with two readers, linear head."""
    feed = {"x": X.astype(dtype)}
    used = {i for n in nodes for i in n.input}
    stored = {k: v.astype(dtype) for k, v in STORED.items() if k in used}
    return graph(nodes, feed, outputs, stored=stored), feed


def test_same_as_onnx_runtime():
    assert_same(*net(), tolerance=1e-5)


# ---- hooks


def test_a_hook_is_an_edit_of_the_graph():
    """g h + c by a hook = by Mul and Add behind the node, which all of its readers read."""
    g, c = RNG.normal(size=(2, 4, 1, 1)).astype(np.float32)
    model, feed = net()
    edited = [
        node("Conv", ["x", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "gamma", "beta", "m", "v"], ["n0"]),
        node("Mul", ["n0", "g"], ["n1"]),
        node("Add", ["n1", "o"], ["n"]),
        *NODES[2:],
    ]
    stored = {k: v.astype(np.float32) for k, v in STORED.items()} | {"g": g, "o": c}
    want = runtime(graph(edited, feed, stored=stored), feed)["y"]
    hook = {"n": lambda h: torch.from_numpy(g) * h + torch.from_numpy(c)}
    got = Network(model, ["y"])(tensors(feed), hook)["y"]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5)
    assert not np.allclose(got.numpy(), runtime(model, feed)["y"], atol=0.1)


@pytest.mark.parametrize("name", ["x", "gamma", "y", "f"])
def test_hooks_on_inputs_stored_tensors_and_outputs(name):
    model, feed = net()
    network = Network(model, ["y", "f"])
    got = network(tensors(feed), {name: lambda h: 2 * h})
    stored = {k: v.astype(np.float32) for k, v in STORED.items()}
    if name == "x":
        want = runtime(model, {"x": 2 * feed["x"]})["y"]
    elif name == "gamma":
        want = runtime(graph(NODES, feed, stored=stored | {"gamma": 2 * stored["gamma"]}), feed)[
            "y"
        ]
    elif name == "y":
        want = 2 * runtime(model, feed)["y"]
    else:
        want = got["f"].numpy() @ stored["w2"] + stored["b2"]
    np.testing.assert_allclose(got["y"].numpy(), want, rtol=1e-4, atol=1e-5)
    plain = network(tensors(feed))["y"].numpy()  # nothing of the hook stays
    np.testing.assert_allclose(plain, runtime(model, feed)["y"], rtol=1e-4, atol=1e-5)


def test_batch_statistics_at_a_site():
    """What MC-batch-norm does: normalise by the mean and variance of the batch."""
    model, feed = net(outputs=("n",))
    network = Network(model, ["n"])

    def standardised(h):
        variance, mean = torch.var_mean(h, (0, 2, 3), keepdim=True, correction=0)
        return (h - mean) / variance.sqrt()

    h = network(tensors(feed), {"n": standardised})["n"]
    np.testing.assert_allclose(h.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(h.std((0, 2, 3), correction=0), 1, atol=1e-4)


# ---- gradients


def test_gradients_are_finite_differences():
    """Of the parameters of a hook, through both readers, in float64."""
    model, feed = net(np.float64)
    network = Network(model, ["y"])

    def loss(g, c):
        out = network(tensors(feed), {"n": lambda h: g * h + c})["y"]
        return torch.log_softmax(out, 1)[:, 0].sum()

    g = torch.from_numpy(RNG.uniform(0.5, 1.5, (4, 1, 1))).requires_grad_()
    c = torch.from_numpy(RNG.normal(size=(4, 1, 1))).requires_grad_()
    loss(g, c).backward()
    step = 1e-6
    for parameter in (g, c):
        for i in range(4):
            moved = []
            for sign in (1, -1):
                copies = [p.detach().clone() for p in (g, c)]
                copies[0 if parameter is g else 1][i] += sign * step
                moved.append(float(loss(*copies)))
            slope = (moved[0] - moved[1]) / (2 * step)
            assert abs(float(parameter.grad[i]) - slope) < 1e-6 * max(1, abs(slope))


def test_gradients_through_what_restorers_use():
    """Resize, ConvTranspose, padding by reflection, pooling, normalisation: gradcheck."""
    nodes = [
        node("InstanceNormalization", ["x", "s", "b"], ["i"]),
        node("Pad", ["i", "pads"], ["p"], mode="reflect"),
        node("Resize", ["p", "", "scales"], ["u"], mode="cubic"),
        node("AveragePool", ["u"], ["d"], kernel_shape=[2, 2], strides=[2, 2], pads=[1, 0, 0, 0]),
        node("ConvTranspose", ["d", "w"], ["t"], strides=[2, 2], output_padding=[1, 1]),
        node("DepthToSpace", ["t"], ["z"], blocksize=2),
        node("LayerNormalization", ["z", "ls"], ["y"]),
    ]
    feed = {"x": RNG.normal(size=(2, 2, 4, 3))}
    stored = {
        "s": RNG.normal(size=2),
        "b": RNG.normal(size=2),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "scales": np.array([1, 1, 1.5, 1.5], np.float32),
        "w": RNG.normal(size=(2, 4, 2, 2)),
        "ls": RNG.normal(size=1),
    }
    network = Network(graph(nodes, feed, stored=stored), ["y"])
    x = torch.from_numpy(feed["x"]).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: network({"x": v})["y"], (x,), fast_mode=True)


def test_stored_tensors_are_frozen_and_calls_agree():
    model, feed = net()
    before = model.SerializeToString()
    network = Network(model, ["y", "w2"])
    first, second = (network(tensors(feed)) for _ in range(2))
    assert not first["y"].requires_grad and not first["w2"].requires_grad
    assert torch.equal(first["y"], second["y"])
    assert model.SerializeToString() == before


# ---- what is run


def test_only_what_the_outputs_need():
    """A node behind the outputs is neither run nor asked for a translation."""
    model, feed = net(nodes=[*NODES, node("Det", ["q"], ["d"])], outputs=("y", "d"))
    model.graph.input.append(helper.make_tensor_value_info("q", TensorProto.FLOAT, [2, 2]))
    network = Network(model, ["f"])
    assert network.inputs == ("x",) and network.outputs == ("f",)
    assert set(network(tensors(feed))) == {"f"}
    assert unsupported(model, ["y"]) == [] and unsupported(model, ["d"]) == [("Det", "d")]


def test_tensors_are_dropped_after_their_last_use():
    model, feed = net()
    seen = {}

    def watch(name):
        def hook(h):
            gc.collect()
            alive = {k for k, ref in seen.items() if ref() is not None}
            h = h.clone()
            seen[name] = weakref.ref(h)
            watched[name] = alive
            return h

        return hook

    watched = {}
    with torch.no_grad():
        Network(model, ["y"])(tensors(feed), {k: watch(k) for k in ("c", "n", "a", "r", "p", "y")})
    assert "c" not in watched["a"] and "n" in watched["r"]
    assert not watched["p"] & {"c", "n", "a"} and not watched["y"] & {"c", "n", "a", "r"}


def test_inputs_with_defaults():
    nodes = [node("Mul", ["x", "k"], ["y"])]
    feed = {"x": np.ones((2, 3), np.float32)}
    model = graph(nodes, feed, stored={"k": np.float32(3)})
    model.graph.input.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, []))
    network = Network(model, ["y"])
    assert network.inputs == ("x",)
    assert float(network(tensors(feed))["y"].sum()) == 18
    assert float(network(tensors(feed) | {"k": torch.tensor(5.0)})["y"].sum()) == 30


def test_functions_are_written_out():
    """A model-local function, called twice and calling another."""
    body = [node("Mul", ["a", "a"], ["s"]), node("Sqrt", ["s"], ["b"])]
    inner = helper.make_function(
        "own", "Magnitude", ["a"], ["b"], body, [helper.make_opsetid("", 20)]
    )
    ids = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    call = [node("Magnitude", ["u"], ["m"], domain="own"), node("Add", ["m", "u"], ["o"])]
    outer = helper.make_function("own", "Twice", ["u"], ["o"], call, ids)
    nodes = [node("Twice", ["x"], ["t"], domain="own"), node("Twice", ["t"], ["y"], domain="own")]
    feed = {"x": np.array([[-2.0, 0.5]], np.float32)}
    model = graph(nodes, feed, functions=[inner, outer], domains=ids[1:])
    got = Network(model, ["y"])(tensors(feed))["y"]
    np.testing.assert_allclose(got.numpy(), [[0.0, 2.0]])


def branches(inner=None):
    """then: 2 x; else: x - k by an own constant (and a further If behind it, where given)."""
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None)  # noqa: E731
    then = helper.make_graph([node("Add", ["x", "x"], ["h"])], "t", [], [value("h")])
    nodes = [node("Sub", ["x", "k"], ["h"])]
    nodes += [node("If", ["c2"], ["z"], then_branch=inner, else_branch=inner)] if inner else []
    stored = [numpy_helper.from_array(np.float32(1), "k")]
    other = helper.make_graph(nodes, "e", [], [value("z" if inner else "h")], stored)
    return then, other


@pytest.mark.parametrize("condition", [True, False])
def test_if_with_a_constant_condition(condition):
    """Inlined, with names of the branches that clash with each other's."""
    then, other = branches()
    nodes = [
        node("Shape", ["k0"], ["s"]),
        node("Size", ["s"], ["rank"]),
        node("Equal", ["rank", "three"], ["c"]),
        node("If", ["c"], ["h1"], then_branch=then, else_branch=other),
        node("Not", ["c"], ["c2"]),
        node("If", ["c2"], ["h2"], then_branch=then, else_branch=other),
        node("Sub", ["h1", "h2"], ["y"]),
    ]
    stored = {"k0": np.zeros((1,) * (3 if condition else 2), np.float32), "three": np.array(3)}
    feed = {"x": np.array([[1.0, 4.0]], np.float32)}
    model = graph(nodes, feed, stored=stored)
    assert unsupported(model, ["y"]) == []
    assert_same(model, feed)


def test_if_within_if():
    """The inner branch reads a name of the branch around it."""
    value = helper.make_tensor_value_info("h3", TensorProto.FLOAT, None)
    inner = helper.make_graph([node("Mul", ["h", "h"], ["h3"])], "i", [], [value])
    then, other = branches(inner)
    nodes = [node("If", ["c"], ["y"], then_branch=then, else_branch=other)]
    feed = {"x": np.array([[1.0, 4.0]], np.float32)}
    assert_same(graph(nodes, feed, stored={"c": np.array(False), "c2": np.array(True)}), feed)


# ---- types


def test_half_precision_weights():
    nodes = [node("Cast", ["w"], ["f"], to=1), node("MatMul", ["x", "f"], ["y"])]
    feed = {"x": RNG.normal(size=(4, 3)).astype(np.float32)}
    model = graph(nodes, feed, stored={"w": RNG.normal(size=(3, 2)).astype(np.float16)})
    assert_same(model, feed)


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8])
def test_quantised_weights(kind):
    """Weights stored in four or eight bits, per channel."""
    low = 0 if kind == TensorProto.UINT4 else -8
    whole = RNG.integers(low, low + 16, (6, 4))
    nodes = [node("DequantizeLinear", ["q", "s"], ["w"], axis=1), node("MatMul", ["x", "w"], ["y"])]
    feed = {"x": RNG.normal(size=(5, 6)).astype(np.float32)}
    scale = RNG.uniform(0.1, 1, 4).astype(np.float32)
    model = graph(nodes, feed, stored={"s": scale}, opset=21)
    model.graph.initializer.append(helper.make_tensor("q", kind, (6, 4), whole.ravel()))
    got = Network(model, ["y"])(tensors(feed))["y"]
    np.testing.assert_allclose(got.numpy(), feed["x"] @ (whole * scale), rtol=1e-4, atol=1e-4)


# ---- refusals


def test_what_has_no_translation():
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantise"),
        node("DequantizeLinear", ["q", "s", "z"], ["h"]),
        node("Own", ["h"], ["y"], domain="com.microsoft"),
    ]
    feed = {"x": np.ones((2, 3), np.float32)}
    stored = {"s": np.float32(0.1), "z": np.uint8(3)}
    model = graph(nodes, feed, stored=stored, domains=[helper.make_opsetid("com.microsoft", 1)])
    assert unsupported(model, ["y"]) == [("QuantizeLinear", "quantise"), ("com.microsoft.Own", "y")]
    with pytest.raises(ModelError, match=r"QuantizeLinear \(node 'quantise'\).*mc_dropout"):
        Network(model, ["y"])


def test_if_on_an_input_and_training_mode():
    then, other = branches()
    feed = {"x": np.ones((2, 4, 3), np.float32), "c": np.array(True)}
    stored = {k: STORED[k].astype(np.float32) for k in ("gamma", "beta", "m", "v")}
    norm = node("BatchNormalization", ["i", *stored], ["y", "", ""], training_mode=1)
    condition = node("If", ["c"], ["i"], then_branch=then, else_branch=other)
    model = graph([condition, norm], feed, stored=stored)
    assert unsupported(model, ["y"]) == [("If", "i"), ("BatchNormalization", "y")]


def test_text_is_refused():
    feed = {"x": np.ones((2, 3), np.float32)}
    model = graph([node("CastLike", ["x", "t"], ["y"])], feed)
    model.graph.initializer.append(helper.make_tensor("t", TensorProto.STRING, [1], [b"a"]))
    assert unsupported(model, ["y"]) == [("Constant", "t")]


def test_errors_name_what_is_wrong():
    model, feed = net()
    network = Network(model, ["y"])
    with pytest.raises(ModelError, match="missing: 'x'"):
        network({})
    with pytest.raises(ModelError, match="'other': not an input; the inputs are 'x'"):
        network(tensors(feed) | {"other": torch.zeros(1)})
    with pytest.raises(ModelError, match="hooks on 'nowhere'"):
        network(tensors(feed), {"nowhere": lambda h: h})
    with pytest.raises(ModelError, match=r"Conv \(node 'c'\) on shapes \(5, 2, 6, 6\)"):
        network({"x": torch.zeros(5, 2, 6, 6)})
    with pytest.raises(ModelError, match="no tensor 'nowhere'; its outputs are 'y'"):
        Network(model, ["nowhere"])
    with pytest.raises(ModelError, match="no tensor 'nowhere'"):
        unsupported(model, ["nowhere"])
    with pytest.raises(ModelError, match="not an ONNX model"):
        Network(b"\xff\xff\xff", ["y"])
    model.opset_import[0].version = 12
    with pytest.raises(ModelError, match="opset 12 is too old; convert the model to 13"):
        Network(model, ["y"])


def test_bytes_and_protos_are_alike():
    model, feed = net()
    got = Network(model.SerializeToString(), ["y"])(tensors(feed))["y"]
    assert torch.equal(
        got,
        Network(onnx.ModelProto.FromString(model.SerializeToString()), ["y"])(tensors(feed))["y"],
    )
