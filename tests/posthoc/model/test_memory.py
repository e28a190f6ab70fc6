"""What a row takes inside a model, counted by hand; and runs of no more rows than that leaves."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from posthoc.model.memory import row_bytes
from posthoc.slices import MOST_BYTES, in_slices, most_rows

F = 4  # bytes of a float32


def model(
    nodes: list[onnx.NodeProto], *, constants: dict[str, np.ndarray] | None = None, rows: str = "N"
) -> onnx.ModelProto:
    """Inputs x (rows×10), outputs y."""
    shape = [rows if rows == "N" else int(rows), 10]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(kind: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


X = {"x": np.ones((5, 10), np.float32)}
WIDE, BACK = np.ones((10, 70), np.float32), np.ones((70, 3), np.float32)


def test_tensors_are_held_until_they_have_been_read() -> None:
    nodes = [
        node("MatMul", "x wide", "a"),  # 70
        node("Relu", "a", "b"),  # 70, beside a
        node("Neg", "b", "c"),  # 70, beside b: a is gone
        node("MatMul", "c back", "y"),  # 3
    ]
    constants = {"wide": WIDE, "back": BACK}
    assert row_bytes(model(nodes, constants=constants), X) == F * (10 + 70 + 70)
    # a is read once more at the end: now b and c are beside it.
    nodes[3:] = [node("Add", "a c", "d"), node("MatMul", "d back", "y")]
    assert row_bytes(model(nodes, constants=constants), X) == F * (10 + 4 * 70 - 70)


def test_what_does_not_grow_with_rows_does_not_count() -> None:
    nodes = [
        node("Mul", "wide wide", "squares"),  # 700, whatever the rows
        node("MatMul", "x squares", "y"),
        node("Shape", "x", "unread"),
    ]
    assert row_bytes(model(nodes, constants={"wide": WIDE}), X) == F * (10 + 70)


def test_graphs_inside_of_nodes_read_too() -> None:
    def branch(name: str) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node("Neg", "a", name)], name, [], [made])

    nodes = [
        node("MatMul", "x wide", "a"),
        node("MatMul", "a back", "b"),
        node("Relu", "b", "c"),
        node("If", "yes", "d", then_branch=branch("t"), else_branch=branch("e")),  # reads a
        node("MatMul", "d back", "y"),
    ]
    constants = {"wide": WIDE, "back": BACK, "yes": np.asarray(True)}
    # At the If: a, its negative, and c, which nobody reads and which went at once.
    assert row_bytes(model(nodes, constants=constants), X) == F * (10 + 70 + 70)


def test_samples_of_a_layer_are_counted() -> None:
    nodes = [node("Expand", "one many", "a"), node("ReduceMean", "a", "y", axes=[0])]
    nodes.insert(0, node("Unsqueeze", "x front", "one"))
    constants = {"front": np.asarray([0]), "many": np.asarray([16, 1, 1])}
    assert row_bytes(model(nodes, constants=constants), X) == F * (10 + 10 + 160)


@pytest.mark.parametrize("rows", ["1", "N"])
def test_a_model_that_does_not_run_so_is_not_known(rows: str) -> None:
    nodes = [node("MatMul", "x wide", "a"), node("Reshape", "a shape", "y")]
    constants = {"wide": WIDE, "shape": np.asarray([1, 70])}  # of one row alone
    assert row_bytes(model(nodes, constants=constants, rows=rows), X) is None


@settings(deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), most=st.integers(1, 50))
def test_slices_give_what_the_whole_gives(rows: int, most: int) -> None:
    rng = np.random.default_rng(rows)
    feed = {"x": rng.standard_normal((rows, 3)), "q": rng.standard_normal((1, 3))}
    seen: list[int] = []

    def run(part):
        seen.append(len(part["x"]))
        return [part["x"] + part["q"], part["x"].sum(1)]

    got = in_slices(run, feed, most)
    assert max(seen) <= most and sum(seen) == rows
    for a, b in zip(got, (feed["x"] + feed["q"], feed["x"].sum(1)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("row", "rows"), [(0, MOST_BYTES), (1, MOST_BYTES), (MOST_BYTES // 3, 3), (10 * MOST_BYTES, 1)]
)
def test_a_run_has_a_row_and_no_more_than_fit(row: int, rows: int) -> None:
    assert most_rows(row) == rows


def test_what_is_not_known_bounds_nothing() -> None:
    assert most_rows(None) > 1 << 40
