"""Samples in the batch axis of graphs that take care: states, indices, branches, other types."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from posthoc.contract import ModelError
from posthoc.network.fold import Noise, believe, sampled, separate
from posthoc.network.sites import named
from tests.posthoc.network.nets import S, run


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
