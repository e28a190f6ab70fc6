"""Samples in the batch axis against a slow loop in torch, one sample at a time through hooks."""

from importlib.metadata import files

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from onnx.utils import Extractor

from posthoc.contract import ModelError
from posthoc.export import export_torch
from posthoc.network.fold import Noise, believe, sampled, separate
from posthoc.network.sites import find_dropouts, find_normalisations, named
from posthoc.runtime import open_session
from tests.posthoc.network.nets import (
    DROPS,
    NETS,
    NORMS,
    network,
    newer,
    older,
    outputs,
    parts,
    rows,
    slowly,
)

S = 3
HOWS = {
    "normalisations kept": lambda net, x: kept(net, x, "normalisation"),
    "dropouts kept": lambda net, x: kept(net, x, "dropout"),
    "not optimised": lambda net, x: newer(net, x, 20),
    "opset 23": lambda net, x: newer(net, x, 23),
    "older, opset 13": lambda net, x: older(net, x, 13),
    "older, opset 17": lambda net, x: older(net, x, 17),
}
CASES = [(name, "dropouts kept") for name in NETS if name != "windows"]  # which has none
CASES += [(name, "normalisations kept") for name in ("images", "windows")]
CASES += [("images", "not optimised"), ("words", "not optimised"), ("maps", "opset 23")]
CASES += [(name, "older, opset 13") for name in ("images", "tokens", "windows")]
CASES += [("words", "older, opset 17")]


def kept(net, x, what):
    return export_torch(net, (x,), input_names=["x"], keep=what).model


def run(model, names, feed):
    return open_session(model).run(names, feed)


def noisy(sites, seed=0):
    """Noise of the kind that each site gets: masks at dropouts, a scale and shift elsewhere."""
    rng, noises = np.random.default_rng(seed), {}
    for site in sites:
        shape = site.shape
        if site.kind == "dropout" and not site.whole and -1 not in shape:
            noises[site.tensor] = Noise((rng.random((S, *shape)) > 0.3) / 0.7)
            continue
        scale, shift = rng.normal(size=(2, S, site.channels)) * 0.3
        noises[site.tensor] = Noise(site.along(1 + scale), site.along(shift))
    return noises


@pytest.mark.parametrize(("name", "how"), CASES)
def test_every_sample_is_the_network_with_its_noise(name, how):
    net = network(name)
    model = HOWS[how](net, rows(name, 3))
    sites, modules = find_normalisations(model), parts(net, NORMS)
    if how == "dropouts kept":
        sites, modules = [*sites, *find_dropouts(model)], [*modules, *parts(net, DROPS)]
    assert len(sites) == len(modules) > 0
    noises, axis, [out] = noisy(sites), {"tokens": 2}.get(name, 1), outputs(model)
    after = sampled(model, out, noises, "members", axis=axis)
    slow = [
        (module, site.batch, noises[site.tensor].gain, noises[site.tensor].offset)
        for site, module in zip(sites, modules, strict=True)
    ]
    for n in (1, 5):
        x = rows(name, n, seed=n)
        feed = {"x": x.numpy()}
        frozen, members = run(after, [out, "members"], feed)
        assert np.array_equal(frozen, run(model, [out], feed)[0])
        want = slowly(net, x, slow)
        got = separate(members, S, axis).reshape(want.shape)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
        assert members.shape[axis] == S * (want.shape[1 + axis] if want.ndim > 2 else 1)
    worst = believe(model, after, feed, output=out, members="members", noises=noises, axis=axis)
    assert worst < 1e-5


def test_sizes_that_were_free_stay_free():
    net = network("maps")
    x = rows("maps", 2)
    dims = {0: torch.export.Dim("n"), 2: 2 * torch.export.Dim("h"), 3: 2 * torch.export.Dim("w")}
    program = torch.export.export(net, (x,), dynamic_shapes=(dims,))
    model = export_torch(program, (x,), input_names=["x"], keep="normalisation").model
    sites = find_normalisations(model, {"x": x.numpy()})
    assert [s.shape for s in sites] == [(4, -1, -1), (6, -1, -1), (5, -1, -1)]
    noises, [out] = noisy(sites), outputs(model)
    after = sampled(model, out, noises, "members", rows={"x": x.numpy()})
    x = torch.randn(3, 1, 12, 10)
    slow = [
        (m, 0, v.gain, v.offset) for m, v in zip(parts(net, NORMS), noises.values(), strict=True)
    ]
    [members] = run(after, ["members"], {"x": x.numpy()})
    np.testing.assert_allclose(separate(members, S), slowly(net, x, slow), atol=2e-5)


def test_masks_can_be_fed_instead_of_stored():
    net = network("maps")
    model, x = kept(net, rows("maps", 3), "dropout"), rows("maps", 4, seed=1).numpy()
    [site], [out] = find_dropouts(model), outputs(model)
    one, two = ({site.tensor: noisy([site], seed)[site.tensor]} for seed in (0, 1))
    fed = sampled(model, out, one, "m", inputs=True)
    for noise in (one, two):
        stored = run(sampled(model, out, noise, "m"), ["m"], {"x": x})[0]
        gain = noise[site.tensor].gain.astype(np.float32)
        assert np.array_equal(run(fed, ["m"], {"x": x, f"{site.tensor}/gain": gain})[0], stored)
    assert believe(model, fed, {"x": x}, output=out, members="m", noises=one) < 1e-5


class Residual(torch.nn.Module):
    """Convolutions whose sums a host adds into the convolution, while nobody else reads them."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(16) for _ in range(4))
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x):
        for i in (0, 2):
            h = torch.relu(self.norms[i](self.layers[i](x)))
            x = torch.relu(x + self.norms[i + 1](self.layers[i + 1](h)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [1, 3], [0, 1, 2, 3]])
def test_frozen_outputs_keep_every_bit_where_noise_enters_a_fused_sum(chosen):
    torch.manual_seed(0)
    net, x = Residual().eval(), torch.randn(8, 16, 12, 12)
    for norm in net.norms:
        norm.running_var.uniform_(0.5, 2)
    model = kept(net, x, "normalisation")
    sites = [find_normalisations(model)[i] for i in chosen]
    noises, [out] = noisy(sites), outputs(model)
    frozen, members = run(sampled(model, out, noises, "m"), [out, "m"], {"x": x.numpy()})
    assert np.array_equal(frozen, run(model, [out], {"x": x.numpy()})[0])
    slow = [
        (net.norms[i], 0, v.gain, v.offset) for i, v in zip(chosen, noises.values(), strict=True)
    ]
    np.testing.assert_allclose(separate(members, S), slowly(net, x, slow), atol=1e-5)


def test_the_prefix_is_computed_once_and_nothing_is_repeated_that_broadcasts():
    torch.manual_seed(0)
    body = [torch.nn.Linear(6, 6), torch.nn.Tanh()] * 3
    net = torch.nn.Sequential(*body, torch.nn.Dropout(0.5), torch.nn.Linear(6, 2)).eval()
    model = kept(net, torch.randn(3, 6), "dropout")
    [site], [out] = find_dropouts(model), outputs(model)
    after = onnx.load_from_string(sampled(model, out, noisy([site]), "m"))
    kinds = [node.op_type for node in after.graph.node]
    assert kinds.count("Gemm") == 3 + 2 and kinds.count("Tanh") == 3
    assert "Tile" not in kinds and "Expand" not in kinds


def text(body, opset=17, inputs="float[N,4] x", outs="float[N,K] y", more=""):
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}{more}]> g ({inputs}) => ({outs}) {{ {body} }}'
    )
    return model.SerializeToString()


def constant(name, value):
    numbers = ", ".join(f"{v:.6f}" for v in value.ravel())
    return f"{name} = Constant<value = float{list(value.shape)} {{{numbers}}}>()\n"


WEIGHT = np.array([1, 2, -3, 4, 5, -6, 7, 8, 9, -10, 11, 12]).reshape(4, 3) / 10
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
GAIN = np.random.default_rng(1).normal(size=(S, 4))


def check_text(model, site, want, feed=None, axis=1, gain=GAIN):
    """``want`` is the output for h·gain[s] at the site, in numpy."""
    noises = {site: Noise(gain)}
    feed = {"x": X} if feed is None else feed
    after = sampled(model, "y", noises, "m", axis=axis, rows=feed)
    got = separate(run(after, ["m"], feed)[0], S, axis)
    np.testing.assert_allclose(
        got, [want(g) for g in gain.astype(np.float32)], rtol=1e-5, atol=1e-5
    )
    believe(model, after, feed, output="y", members="m", noises=noises, axis=axis)


def test_rows_that_are_not_first_in_a_flattened_axis():
    # All tokens of all rows, the token counted first: rows are not one behind the other.
    model = text(
        """t = Transpose<perm = [1, 0, 2]>(x)
           flat = Constant<value_ints = [-1, 4]>()
           beside = Reshape(t, flat)
           h = Tanh(x)
           u = Transpose<perm = [1, 0, 2]>(h)
           v = Reshape(u, flat)
           sum = Add(beside, v)
           shape = Shape(t)
           back = Reshape(sum, shape)
           y = Transpose<perm = [1, 0, 2]>(back)""",
        inputs="float[N,T,4] x",
        outs="float[N,T,4] y",
    )
    x = np.random.default_rng(2).normal(size=(4, 3, 4)).astype(np.float32)
    check_text(model, "h", lambda g: x + g * np.tanh(x), {"x": x}, 2, GAIN[:, None])
    with pytest.raises(ModelError, match=r"'v' .* does not hold the rows in one axis"):
        named(model, ["v"], {"x": x})
    with pytest.raises(ModelError, match=r"tensor 'v' \(float32"):
        sampled(model, "y", {"v": Noise(GAIN)}, "m", rows={"x": x})


def test_branches_and_loops_that_read_what_has_samples():
    model = text(
        """h = Tanh(x)
           size = Shape(x)
           one = Constant<value = int64[1] {1}>()
           two = Constant<value = int64[1] {2}>()
           width = Slice(size, one, two)
           four = Constant<value = int64[1] {4}>()
           same = Equal(width, four)
           chosen = If (same) <
             then_branch = then () => (float[N,4] a) { b = Add(h, x)  a = Abs(b) },
             else_branch = other () => (float[N,4] c) { c = Identity(h) }
           >
           times = Constant<value_int = 3>()
           true = Constant<value = bool {1}>()
           y = Loop (times, true, chosen) <
             body = loop (int64 i, bool on, float[N,4] state) => (bool on2, float[N,4] next) {
               on2 = Identity(on)
               next = Add(state, h)
             }
           >"""
    )

    def want(g):
        h = np.tanh(X) * g
        return np.abs(h + X) + 3 * h

    check_text(model, "h", want)


def test_states_and_constants_that_are_as_long_as_the_batch():
    rng = np.random.default_rng(3)
    w, r = rng.normal(size=(1, 3, 2)), rng.normal(size=(1, 3, 3))
    model = text(
        constant("w", w)
        + constant("r", r)
        + """h = Tanh(x)
           size = Shape(x)
           zero = Constant<value = int64[1] {0}>()
           one = Constant<value = int64[1] {1}>()
           n = Slice(size, zero, one)
           three = Constant<value = int64[1] {3}>()
           shape = Concat<axis = 0>(one, n, three)
           start = ConstantOfShape<value = float[1] {0.5}>(shape)
           split = Constant<value_ints = [0, 2, 2]>()
           steps = Reshape(h, split)
           turned = Transpose<perm = [1, 0, 2]>(steps)
           all, last = RNN<hidden_size = 3>(turned, w, r, , , start)
           y = Squeeze(last, zero)"""
    )

    def want(g):
        state = np.full((len(X), 3), 0.5)
        for step in np.moveaxis((np.tanh(X) * g).reshape(len(X), 2, 2), 1, 0):
            state = np.tanh(step @ w[0].T + state @ r[0].T)
        return state

    check_text(model, "h", want)


def test_rows_chosen_by_an_index_counted_over_the_batch():
    # The last word of each row: h[arange(N), length - 1].
    model = text(
        """h = Tanh(x)
           size = Shape<start = 0, end = 1>(x)
           n = Squeeze(size)
           zero = Constant<value_int = 0>()
           one = Constant<value_int = 1>()
           counted = Range(zero, n, one)
           last = Constant<value_ints = [-1]>()
           index = Unsqueeze(counted, last)
           place = Unsqueeze(length, last)
           both = Concat<axis = 1>(index, place)
           y = GatherND(h, both)""",
        inputs="float[N,T,4] x, int64[N] length",
        outs="float[N,4] y",
    )
    x = np.random.default_rng(2).normal(size=(4, 3, 4)).astype(np.float32)
    length = np.array([0, 2, 1, 0])
    feed = {"x": x, "length": length}
    check_text(model, "h", lambda g: g * np.tanh(x)[range(4), length], feed, gain=GAIN[:, None])


@pytest.mark.parametrize(("opset", "kind"), [(13, "float16"), (21, "double"), (23, "float")])
def test_other_types_and_opsets(opset, kind):
    short = {"float16": "float16", "double": "float64", "float": "float32"}[kind]
    code = {"float16": 10, "double": 11, "float": 1}[kind]
    model = text(
        f"""wide = Constant<value = float[4,3] {{{", ".join(str(i / 9) for i in range(12))}}}>()
           w = Cast<to = {code}>(wide)
           a = Abs(x)
           h = Sqrt(a)
           skip = Add(h, x)
           y = MatMul(skip, w)""",
        opset=opset,
        inputs=f"{kind}[N,4] x",
        outs=f"{kind}[N,3] y",
    )
    x, w = X.astype(short), (np.arange(12) / 9).reshape(4, 3)
    after = sampled(model, "y", {"h": Noise(GAIN, GAIN)}, "m")
    got = separate(run(after, ["m"], {"x": x})[0], S)
    assert got.dtype == short
    want = [(np.sqrt(abs(X)) * g + g + X) @ w for g in GAIN]
    np.testing.assert_allclose(got, want, atol=2e-2 if short == "float16" else 1e-5)
    noises = {"h": Noise(GAIN, GAIN)}
    believe(model, after, {"x": x}, output="y", members="m", noises=noises)


def test_a_dropout_left_in_training_mode_draws_no_masks_in_the_samples():
    model = text(
        """t = Tanh(x)
           p = Constant<value_float = 0.5>()
           on = Constant<value = bool {1}>()
           h = Dropout(t, p, on)
           y = Abs(h)"""
    )
    again = {run(sampled(model, "y", {"h": Noise(GAIN)}, "m"), ["m"], {"x": X})[0].tobytes()}
    [members] = run(sampled(model, "y", {"h": Noise(GAIN)}, "m"), ["m"], {"x": X})
    assert again == {members.tobytes()}
    np.testing.assert_allclose(separate(members, S), [abs(np.tanh(X) * g) for g in GAIN], atol=1e-5)


def test_magika_with_noise_at_its_normalisations():
    """Against its own graph cut in three, run once a sample."""
    [path] = [f for f in files("magika") if f.match("*/standard_v3_3/model.onnx")]
    model = path.locate().read_bytes()
    sites, [out] = find_normalisations(model), outputs(model)
    first, second = (s.tensor for s in sites)
    noises = noisy(sites)
    x = np.random.default_rng(0).integers(0, 257, (4, 2048)).astype(np.int32)
    after = sampled(model, out, noises, "members")
    frozen, members = run(after, [out, "members"], {"bytes": x})
    assert np.array_equal(frozen, run(model, [out], {"bytes": x})[0])
    proto = onnx.load_from_string(model)
    for name in (first, second):
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        proto.graph.value_info.append(value)
    cut = Extractor(proto)
    middle = cut.extract_model(["bytes", first], [second]).SerializeToString()
    end = cut.extract_model(["bytes", second], [out]).SerializeToString()
    [h] = run(cut.extract_model(["bytes"], [first]).SerializeToString(), None, {"bytes": x})
    for s, got in enumerate(separate(members, S)):
        one, two = (
            (noises[t].gain[s].astype(np.float32), noises[t].offset[s].astype(np.float32))
            for t in (first, second)
        )
        [deep] = run(middle, None, {"bytes": x, first: h * one[0] + one[1]})
        [want] = run(end, None, {"bytes": x, second: deep * two[0] + two[1]})
        np.testing.assert_allclose(got, want, atol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    samples=st.integers(1, 5),
    n=st.integers(1, 6),
    first=st.sampled_from([None, (4,), (1,)]),
    second=st.sampled_from([None, (3,), (1,)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_of_noise_at_two_sites(samples, n, first, second, seed):
    rng = np.random.default_rng(seed)
    model = text(
        constant("w", WEIGHT)
        + """h = Tanh(x)
           k = MatMul(h, w)
           twice = Concat<axis = 1>(k, x)
           y = Identity(twice)"""
    )
    one, two = (None if s is None else rng.normal(size=(samples, *s)) for s in (first, second))
    offset = rng.normal(size=(samples, 1))
    noises = {"h": Noise(one), "k": Noise(two, offset)}
    x = rng.normal(size=(n, 4)).astype(np.float32)
    [members] = run(sampled(model, "y", noises, "m"), ["m"], {"x": x})
    for s, got in enumerate(separate(members, samples)):
        h = np.tanh(x) * (1 if one is None else one[s])
        k = h @ WEIGHT * (1 if two is None else two[s]) + offset[s]
        np.testing.assert_allclose(got, np.concatenate([k, x], 1), atol=1e-5)


SMALL = (
    constant("w", WEIGHT)
    + """h = Tanh(x)
    y = MatMul(h, w)
    aside = Abs(x)
    count = Shape(x)"""
)


@pytest.mark.parametrize(
    ("noises", "more", "why"),
    [
        ({"nowhere": Noise(GAIN)}, {}, "the model has no tensor 'nowhere'"),
        ({"aside": Noise(GAIN)}, {}, "output 'y' does not depend on 'aside'"),
        ({"h": Noise(GAIN[:, :3])}, {}, r"gain at 'h' has shape \(3, 3\); a row of it is \(4,\)"),
        ({"h": Noise(None, GAIN[:, None])}, {}, r"offset at 'h' has shape \(3, 1, 4\)"),
        ({"h": Noise(GAIN, GAIN[:2])}, {}, r"has \[2, 3\] samples"),
        ({"h": Noise()}, {}, r"noise at 'h' has \[\] samples"),
        ({}, {}, "noise at no tensor has"),
        ({"w": Noise(GAIN)}, {}, "tensor 'w' .* does not hold floats with the rows"),
        ({"h": Noise(GAIN)}, {"members": "aside"}, "has a tensor 'aside' already"),
        ({"h": Noise(GAIN)}, {"axis": 2}, "members need rows in axis 0 and classes in another"),
    ],
)
def test_what_cannot_be_sampled_is_named(noises, more, why):
    model = text(SMALL)
    with pytest.raises(ModelError, match=why):
        sampled(model, "y", noises, **{"members": "m", **more})


def test_a_graph_that_does_not_take_noise_is_not_believed():
    # The bare rows are the same whatever is beside them: the mean over the batch is that of one.
    model = text(
        """h = Tanh(x)
           g = Floor(h)
           mean = ReduceMean<axes = [0], keepdims = 1>(g)
           y = Sub(h, mean)"""
    )
    x, noises = np.abs(X), {"h": Noise(GAIN)}
    after = sampled(model, "y", noises, "m", rows={"x": x})
    with pytest.raises(ModelError, match="'m': the samples of a row of 'y' change with the rows"):
        believe(model, after, {"x": x}, output="y", members="m", noises=noises)
    other = text("y = Tanh(x)")
    with pytest.raises(ModelError, match="output 'y' is not what it was before"):
        believe(
            text("y = Abs(x)"),
            sampled(other, "y", {"x": Noise(GAIN)}, "m"),
            {"x": X},
            output="y",
            members="m",
            noises={"x": Noise(GAIN)},
        )
