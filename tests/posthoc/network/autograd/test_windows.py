"""Windows, resizing and slicing in any arrangement, against ONNX Runtime."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.posthoc.network.autograd.graphs import assert_same, graph, node

few = settings(deadline=None, derandomize=True, max_examples=40)
small = st.integers(0, 2)
PADDING = st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])


def values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@st.composite
def windows(draw, dilated=True):
    """Attributes of a window over one, two or three axes."""
    n = draw(st.integers(1, 3))
    several = lambda low, high: draw(st.lists(st.integers(low, high), min_size=n, max_size=n))  # noqa: E731
    found = {"kernel_shape": several(1, 3), "strides": several(1, 3)}
    auto = draw(PADDING)
    if auto == "NOTSET":
        begin, end = several(0, 2), several(0, 2)
        # No more than the window: a mean over padding alone has no value.
        kernel = found["kernel_shape"]
        begin = [min(b, k - 1) for b, k in zip(begin, kernel, strict=True)]
        end = [min(e, k - 1) for e, k in zip(end, kernel, strict=True)]
        found["pads"] = begin + end
    else:
        found["auto_pad"] = auto
    if dilated and auto in ("NOTSET", "VALID"):
        found["dilations"] = several(1, 2)
    return n, found


def runs(attributes):
    """ONNX Runtime refuses to pool with steps beyond the window and SAME."""
    pairs = zip(attributes["strides"], attributes["kernel_shape"], strict=True)
    same = attributes.get("auto_pad", "").startswith("SAME")
    return not same or all(s <= k for s, k in pairs)


@few
@given(windows(), st.sampled_from([1, 2]))
def test_conv(window, group):
    n, attributes = window
    x = values(2, 4, *(8, 7, 6)[:n])
    stored = {
        "w": values(6, 4 // group, *attributes["kernel_shape"], seed=1),
        "b": values(6, seed=2),
    }
    conv = node("Conv", ["x", "w", "b"], ["y"], group=group, **attributes)
    assert_same(graph([conv], {"x": x}, stored=stored), {"x": x})


@few
@given(windows(), st.sampled_from([1, 2]), st.booleans(), st.data())
def test_conv_transpose(window, group, sized, data):
    n, attributes = window
    assume(attributes.get("auto_pad") in (None, "VALID"))
    strides = attributes["strides"]
    x = values(2, 4, *(5, 4, 3)[:n])
    if sized:
        attributes.pop("pads", None)
        attributes["output_shape"] = [s * t for s, t in zip(x.shape[2:], strides, strict=True)]
    else:
        attributes["output_padding"] = [data.draw(st.integers(0, s - 1)) for s in strides]
    stored = {
        "w": values(4, 3, *attributes["kernel_shape"], seed=1),
        "b": values(3 * group, seed=2),
    }
    conv = node("ConvTranspose", ["x", "w", "b"], ["y"], group=group, **attributes)
    assert_same(graph([conv], {"x": x}, stored=stored), {"x": x})


@few
@given(windows(), st.booleans())
def test_max_pool(window, ceil):
    n, attributes = window
    assume(runs(attributes))
    x = values(2, 3, *(8, 7, 6)[:n])
    pool = node("MaxPool", ["x"], ["y"], ceil_mode=int(ceil), **attributes)
    assert_same(graph([pool], {"x": x}), {"x": x})


@few
@given(windows(), st.booleans(), st.booleans())
def test_average_pool(window, ceil, include):
    n, attributes = window
    assume(runs(attributes))
    x = values(2, 3, *(8, 7, 6)[:n])
    pool = node(
        "AveragePool",
        ["x"],
        ["y"],
        ceil_mode=int(ceil),
        count_include_pad=int(include),
        **attributes,
    )
    assert_same(graph([pool], {"x": x}), {"x": x})


@few
@given(
    st.sampled_from(["nearest", "linear", "cubic"]),
    st.sampled_from(["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]),
    st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]),
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
    st.booleans(),
)
def test_resize(mode, where, nearest, size, by_sizes):
    x = values(2, 3, 6, 5)
    stored = {
        "r": np.zeros(0, np.float32),
        "s": np.array([1, 1, size[0] / 4, size[1] / 4], np.float32),
        "n": np.array([2, 3, *size]),
    }
    inputs = ["x", "", "", "n"] if by_sizes else ["x", "", "s"]
    assume(by_sizes or min(int(6 * size[0] / 4), int(5 * size[1] / 4)) >= 1)
    resize = node(
        "Resize",
        inputs,
        ["y"],
        mode=mode,
        coordinate_transformation_mode=where,
        nearest_mode=nearest,
    )
    used = {k: v for k, v in stored.items() if k in inputs}
    for opset in (13, 20):
        assert_same(graph([resize], {"x": x}, stored=used, opset=opset), {"x": x})


@few
@given(
    st.sampled_from(["constant", "reflect", "edge", "wrap"]),
    st.lists(st.integers(-1, 2), min_size=4, max_size=4),
)
def test_pad(mode, pads):
    x = values(2, 3, 4, 5)
    stored = {"p": np.array([0, 0, *pads[:2], 0, 0, *pads[2:]]), "v": np.float32(0.5)}
    pad = node("Pad", ["x", "p", "v"], ["y"], mode=mode)
    assert_same(graph([pad], {"x": x}, stored=stored), {"x": x})


@few
@given(
    st.integers(-7, 7),
    st.one_of(st.integers(-8, 8), st.sampled_from([2**63 - 1, -(2**63) + 1])),
    st.sampled_from([-3, -2, -1, 1, 2, 3]),
    st.integers(-3, 2),
)
def test_slice(start, end, step, axis):
    x = values(3, 6, 5)
    stored = {
        "s": np.array([start]),
        "e": np.array([end]),
        "a": np.array([axis]),
        "t": np.array([step]),
    }
    cut = node("Slice", ["x", "s", "e", "a", "t"], ["y"])
    assert_same(graph([cut], {"x": x}, stored=stored), {"x": x})
