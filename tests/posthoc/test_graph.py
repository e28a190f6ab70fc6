"""Fragments: constants stored once, public names without copies, and errors that name the cause."""

from __future__ import annotations

import numpy as np
import pytest

from posthoc.contract import ModelError
from posthoc.graph import Fragment, append, emit_count_below, standalone, taken_names
from posthoc.runtime import open_session

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_equal_constants_are_stored_once() -> None:
    g = Fragment()
    assert g.const([1.0, 2.0]) == g.const(np.asarray([1.0, 2.0]))
    assert g.const([1.0, 2.0]) != g.const([1.0, 2.0], "int64")
    assert g.const(1.0) != g.const([1.0])


def test_one_tensor_may_have_two_public_names_and_inner_users() -> None:
    g = Fragment()
    x = g.input("x", "float32", ["N", 3])
    doubled = g.op("Mul", x, g.const(2.0))
    more = g.op("Add", doubled, g.const(1.0))
    for name, out in ((doubled, "a"), (doubled, "b"), (more, "c"), (x, "d")):
        g.publish(name, out)
    assert sum(n.op_type == "Identity" for n in g.nodes) == 2  # the second name, and the input
    model = standalone(g, dict.fromkeys("abcd", ("float32", (-1, 3))))
    a, b, c, d = open_session(model).run(list("abcd"), {"x": X})
    np.testing.assert_array_equal(a, X * 2)
    np.testing.assert_array_equal(b, X * 2)
    np.testing.assert_array_equal(c, X * 2 + 1)
    np.testing.assert_array_equal(d, X)


def test_an_optional_input_has_a_default_that_broadcasts() -> None:
    g = Fragment()
    x = g.input("x", "float32", ["N", 3])
    level = g.unsqueeze(g.optional_input("level", 2.0, "R"), 1)
    g.publish(g.op("Add", x, level), "y")
    session = open_session(standalone(g, {"y": ("float32", (-1, 3))}))
    np.testing.assert_array_equal(session.run(None, {"x": X})[0], X + 2)
    each = np.asarray([1, 5], np.float32)
    got = session.run(None, {"x": X, "level": each})[0]
    np.testing.assert_array_equal(got, X + each[:, None])


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
def test_reductions_take_the_form_of_their_opset(opset: int) -> None:
    g = Fragment(opset)
    x = g.input("x", "float32", ["N", 3])
    g.publish(g.reduce("ReduceMax", x, 1), "top")
    g.publish(g.sum(x, 1), "total")
    session = open_session(standalone(g, {"top": ("float32", (-1,)), "total": ("float32", (-1,))}))
    top, total = session.run(None, {"x": X})
    np.testing.assert_array_equal(top, X.max(1))
    np.testing.assert_array_equal(total, X.sum(1))


def test_a_broken_graph_is_refused() -> None:
    with pytest.raises(ModelError, match="opset 12 is too old"):
        Fragment(12)
    g = Fragment()
    g.op("Add", g.input("x", "float32", ["N", 3]), "nowhere", out="y")
    with pytest.raises(ModelError, match="not valid ONNX"):
        standalone(g, {"y": ("float32", (-1, 3))})


def test_a_fragment_stands_behind_a_model() -> None:
    front = Fragment()
    front.publish(front.op("Neg", front.input("x", "float32", ["N", 3])), "z")
    model = standalone(front, {"z": ("float32", (-1, 3))})
    assert taken_names(model) == {"x", "z"}
    back = Fragment(prefix="uq/")
    back.publish(back.op("Abs", "z"), "size")
    both = append(model, back, {"size": ("float32", (-1, 3))})
    z, size = open_session(both).run(["z", "size"], {"x": X})
    np.testing.assert_array_equal(z, -X)
    np.testing.assert_array_equal(size, X)


@pytest.mark.parametrize("m", [1, 2, 3, 15, 16, 17, 1000, 1024])
def test_a_count_below_is_a_binary_search(m: int) -> None:
    rng = np.random.default_rng(m)
    table = np.sort(rng.integers(0, 4 + m // 3, m)).astype(np.float32)  # with ties
    x = np.concatenate([table, table + 0.5, [-1, 1e9, -np.inf, np.inf, np.nan]]).astype("f4")
    g = Fragment()
    g.publish(emit_count_below(g, table, g.input("x", "float32", ["N"])), "n")
    (got,) = open_session(standalone(g, {"n": ("float32", (-1,))})).run(None, {"x": x})
    np.testing.assert_array_equal(got[:-1], np.searchsorted(table, x[:-1], side="left"))
    assert got[-1] == 0  # NaN lies above nothing
