"""Normalisations and dropouts found in graphs, against the torch modules that they came from."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser
from torch import nn

from posthoc.contract import ModelError
from posthoc.export import export_torch
from posthoc.network.sites import (
    find_dropouts,
    find_normalisations,
    named,
    normalisation_hint,
)
from posthoc.runtime import open_session
from tests.posthoc.network.nets import NORMS, Root, network, newer, older, parts, rows

KINDS = {
    nn.BatchNorm1d: "batch",
    nn.BatchNorm2d: "batch",
    nn.BatchNorm3d: "batch",
    nn.LayerNorm: "layer",
    nn.GroupNorm: "group",
    nn.InstanceNorm2d: "instance",
    nn.RMSNorm: "rms",
    Root: "rms",
}


def exported(net, x, how):
    if how == "kept":
        return export_torch(net, (x,), input_names=["x"], keep="normalisation").model
    return older(net, x, how) if how < 18 else newer(net, x, how)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("images", "kept"), ("volumes", "kept"), ("words", "kept"), ("tokens", "kept"),
        ("maps", 18), ("volumes", 20), ("images", 23),
        ("images", 13), ("tokens", 13), ("windows", 13), ("words", 16), ("words", 17),
    ],
)  # fmt: skip
def test_every_normalisation_is_found_with_its_parameters(name, how):
    net, x = network(name), rows(name, 3)
    modules, values = parts(net, NORMS), []
    hooks = [m.register_forward_hook(lambda m, i, h: values.append(h)) for m in modules]
    model = exported(net, x, how)
    values.clear()
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    sites = find_normalisations(model, {"x": x.numpy()})
    assert [s.kind for s in sites] == [KINDS[type(m)] for m in modules]
    proto = onnx.load_from_string(model)
    proto.graph.output.extend(onnx.ValueInfoProto(name=s.tensor) for s in sites)
    got = open_session(proto.SerializeToString()).run([s.tensor for s in sites], {"x": x.numpy()})
    for site, module, h, value in zip(sites, modules, got, values, strict=True):
        np.testing.assert_allclose(h, value.numpy(), atol=1e-5)
        assert h.shape[site.axis] == site.channels == len(module.weight)
        assert site.batch == (1 if name == "words" and site.kind == "layer" and h.ndim == 3
                              and h.shape[1] == 3 else 0)  # fmt: skip
        assert np.delete(h.shape, site.batch).tolist() == list(site.shape)
        np.testing.assert_array_equal(site.gamma, module.weight.detach().double())
        bias = getattr(module, "bias", None)
        bias = torch.zeros_like(module.weight) if bias is None else bias
        np.testing.assert_array_equal(site.beta, bias.detach().double())
        if site.kind == "batch":
            variance, eps = site.variance_eps
            np.testing.assert_array_equal(variance, module.running_var.double())
            assert eps == pytest.approx(module.eps)
        else:
            assert site.variance_eps is None


def test_a_folded_normalisation_is_gone_and_the_hint_says_what_to_do():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
    folded = export_torch(net, (torch.randn(2, 1, 5, 5),), input_names=["x"]).model
    assert find_normalisations(folded) == []
    hint = normalisation_hint(folded)
    for words in ("fold", "module:factory", "optimize=False", "PRESERVE", "mc_dropout"):
        assert words in hint


def text(body, opset=17, inputs="float[N,4] x", outs="float[N,4] y", domains=""):
    return parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}{domains}]> '
        f"g ({inputs}) => ({outs}) <float[4] v = {{1, 2, 3, 4}}, float[4] b = {{0, 1, 0, 1}}, "
        f"float e = {{0.001}}, float two = {{2}}> {{ {body} }}"
    ).SerializeToString()


NORMALISED = """m = ReduceMean<axes = [-1]>(x)
    c = Sub(x, m)
    q = Mul(c, c)
    s = ReduceMean<axes = [-1]>(q)
    t = Add(s, e)
    r = Sqrt(t)
    """


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (NORMALISED + "d = Div(c, r) w = Mul(d, v) y = Add(w, b)", "layer"),
        (NORMALISED + "i = Reciprocal(r) g = Mul(i, v) w = Mul(c, g) y = Add(b, w)", "layer"),
        (NORMALISED + "w = Mul(v, c) d = Div(w, r) y = Add(d, b)", "layer"),
        (NORMALISED.replace("q = Mul(c, c)", "q = Pow(c, two)")
         + "d = Div(c, r) w = Mul(d, v) y = Add(w, b)", "layer"),
        ("q = Mul(x, x) s = ReduceMean<axes = [-1]>(q) t = Add(s, e) r = Sqrt(t)"
         " d = Div(x, r) w = Mul(d, v) y = Add(w, b)", "rms"),
        # The variance as the mean of squares less the square of the mean, held above zero.
        ("m = ReduceMean<axes = [-1]>(x) q = Mul(x, x) s = ReduceMean<axes = [-1]>(q)"
         " k = Mul(m, m) f = Sub(s, k) a = Relu(f) t = Add(a, e) r = Sqrt(t) c = Sub(x, m)"
         " d = Div(c, r) w = Mul(d, v) y = Add(w, b)", "layer"),
        # The standard deviation with ε outside.
        (NORMALISED.replace("t = Add(s, e)", "").replace("Sqrt(t)", "Sqrt(s)")
         + "o = Add(r, e) d = Div(c, o) w = Mul(d, v) y = Add(w, b)", "layer"),
    ],
)  # fmt: skip
def test_normalisations_that_were_taken_apart(body, kind):
    [site] = find_normalisations(text(body))
    assert (site.kind, site.tensor, site.axis, site.channels) == (kind, "y", 1, 4)
    np.testing.assert_array_equal(site.gamma, [1, 2, 3, 4])
    np.testing.assert_array_equal(site.beta, [0, 1, 0, 1])


@pytest.mark.parametrize(
    "body",
    [
        "h = Tanh(x) w = Mul(h, v) y = Add(w, b)",  # a scale layer
        "h = Softmax(x) w = Mul(h, v) y = Add(w, b)",
        "m = ReduceMean<axes = [-1]>(x) c = Sub(x, m) y = Mul(c, v)",  # centred only
        "h = Sqrt(x) d = Div(x, h) y = Mul(d, v)",
        "a = Abs(x) h = Sqrt(a) d = Div(x, h) y = Mul(d, v)",
        # Divided by the root of the squares of something else.
        "o = Tanh(x) q = Mul(o, o) s = ReduceMean<axes = [-1]>(q) t = Add(s, e) r = Sqrt(t)"
        " d = Div(x, r) y = Mul(d, v)",
        # Multiplied by the root rather than divided.
        "q = Mul(x, x) s = ReduceMean<axes = [-1]>(q) r = Sqrt(s) d = Mul(x, r) y = Mul(d, v)",
        # Without a scale for each channel.
        "q = Mul(x, x) s = ReduceMean<axes = [-1]>(q) r = Sqrt(s) d = Div(x, r) y = Mul(d, two)",
    ],
)
def test_what_looks_like_a_normalisation_is_not_taken(body):
    assert find_normalisations(text(body)) == []


def test_a_shift_that_not_everybody_sees_is_no_part_of_it():
    body = NORMALISED + "d = Div(c, r) w = Mul(d, v) z = Add(w, b) y = Mul(w, z)"
    [site] = find_normalisations(text(body))
    assert site.tensor == "w" and not site.beta.any()


def test_a_scale_for_each_group_is_a_scale_for_each_channel():
    model = text(
        "s = Constant<value_floats = [1.0, 2.0]>() z = Constant<value_floats = [0.5, 0.0]>()"
        " y = GroupNormalization<num_groups = 2>(x, s, z)",
        opset=18, inputs="float[N,4,3] x", outs="float[N,4,3] y",
    )  # fmt: skip
    [site] = find_normalisations(model)
    np.testing.assert_array_equal(site.gamma, [1, 1, 2, 2])
    np.testing.assert_array_equal(site.beta, [0.5, 0.5, 0, 0])
    assert (site.kind, site.axis, site.shape) == ("group", 1, (4, 3))


def test_normalisations_of_a_host_and_those_of_a_whole_row():
    model = text(
        "h = com.microsoft.SkipLayerNormalization<epsilon = 0.00001>(x, x, v, b) y = Tanh(h)",
        inputs="float[N,3,4] x", outs="float[N,3,4] y", domains=', "com.microsoft" : 1',
    )  # fmt: skip
    [site] = find_normalisations(model)
    assert (site.kind, site.tensor, site.axis, site.shape) == ("layer", "h", 2, (3, 4))
    # γ of two axes has no channels.
    net = nn.Sequential(nn.LayerNorm([3, 4]), nn.Flatten(), nn.LayerNorm(12)).eval()
    with torch.no_grad():
        net[0].weight.uniform_(0.5, 1.5)
    model = export_torch(net, (torch.randn(2, 3, 4),), input_names=["x"]).model
    assert [s.channels for s in find_normalisations(model)] == [12]


def test_statistics_of_the_batch_are_not_a_normalisation_of_rows():
    model = text(
        """n = Constant<value_floats = [0.0, 0.0, 0.0, 0.0]>()
           p = Constant<value_floats = [1.0, 1.0, 1.0, 1.0]>()
           y, i, j = BatchNormalization<training_mode = 1>(x, v, b, n, p)"""
    )
    assert find_normalisations(model) == []


def test_dropouts_with_their_rates():
    model = text(
        """a = Constant<value_float = 0.25>()
           z = Constant<value_float = 0.0>()
           on = Constant<value = bool {1}>()
           f = Dropout(x)
           g = Dropout(f, a)
           k = Dropout(g, z)
           l = Dropout(k, a, on)
           o = Dropout(x, a)
           y = Tanh(l)"""
    )
    assert [(s.tensor, s.rate, s.shape) for s in find_dropouts(model, output="y")] == [
        ("f", 0.5, (4,)), ("g", 0.25, (4,)), ("l", 0.25, (4,)),
    ]  # fmt: skip
    assert [s.tensor for s in find_dropouts(model)] == ["f", "g", "l", "o"]
    old = text("h = Dropout<ratio = 0.4>(x) y = Tanh(h)", opset=11)
    assert [(s.rate, s.axis, s.kind, s.whole) for s in find_dropouts(old)] == [
        (pytest.approx(0.4), 1, "dropout", False)
    ]


def test_named_tensors():
    weight = numpy_helper.from_array(np.ones((6, 2, 1, 1), np.float32), "w")
    last = numpy_helper.from_array(np.ones((6, 3), np.float32), "m")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["layer1/conv"]),
            helper.make_node("Relu", ["layer1/conv"], ["layer1/relu"]),
            helper.make_node("Shape", ["x"], ["size"]),
            helper.make_node("Transpose", ["layer1/relu"], ["turned"], perm=[0, 2, 3, 1]),
            helper.make_node("MatMul", ["turned", "m"], ["scores"]),
            helper.make_node("Transpose", ["scores"], ["y"], perm=[3, 0, 1, 2]),
            helper.make_node("ReduceSum", ["x"], ["total"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, "H", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, "N", "H", 4])],
        [weight, last],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model, x = made.SerializeToString(), np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    probe = {"x": x.astype(np.float32)}
    [first, flipped, end, given] = named(model, ["layer1/relu", "turned", "y", "x"], probe)
    assert (first.axis, first.channels, first.shape, first.batch) == (1, 6, (6, -1, 4), 0)
    assert (flipped.axis, flipped.channels, flipped.shape) == (3, 6, (-1, 4, 6))
    assert (end.batch, end.shape, end.kind, end.gamma) == (1, (3, -1, 4), "tensor", None)
    assert first.node == "Relu layer1/relu" and given.axis == 1
    values = np.arange(12.0).reshape(2, 6)
    assert first.along(values).shape == (2, 6, 1, 1)
    assert flipped.along(values).shape == (2, 1, 1, 6)
    for name, why in {
        "layer1/rely": "no tensor 'layer1/rely'; like it are 'layer1/relu'",
        "conv": "no tensor 'conv'; like it are 'layer1/conv'",
        "size": "does not depend on the inputs|holds int64",
        "w": "'w' does not depend on the inputs",
        "total": "'total' of shape .* does not hold the rows in one axis",
    }.items():
        with pytest.raises(ModelError, match=why):
            named(model, [name], probe)
