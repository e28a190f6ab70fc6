"""Batches against a row-by-row loop, with a real graph that fails, or gives NaN, on some rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from posthoc.contract import Array, DataError, ModelError
from service.scoring.answers import Inputs, answer

ROWS = 60


@pytest.fixture(scope="module")
def run() -> Callable[..., dict[str, Array]]:
    """log(table[index]): an index out of range fails the whole run, index 0 gives -inf, 1 NaN."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "index"], ["entry"]),
            helper.make_node("Log", ["entry"], ["std"]),
            helper.make_node("Log", ["entry"], ["lower"]),
        ],
        "lookup",
        [value("index", TensorProto.INT64, ["N"])],
        [value("std", TensorProto.FLOAT, ["N"]), value("lower", TensorProto.FLOAT, ["N"])],
        [numpy_helper.from_array(np.array([0, -1, 2, 3, 4], np.float32), "table")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tests"
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = ["std", "lower"]

    def run(inputs: Inputs) -> dict[str, Array]:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run


@given(
    index=st.lists(st.integers(-8, 9), min_size=ROWS, max_size=ROWS),
    known=st.sets(st.integers(0, ROWS - 1), max_size=10),
    batch_size=st.integers(1, ROWS + 5),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_exactly_the_bad_rows_are_told_apart(
    run: Callable[..., dict[str, Array]], index: list[int], known: set[int], batch_size: int
) -> None:
    got = answer(run, {"index": np.array(index)}, dict.fromkeys(known, "known"), batch_size)
    table = [0, -1, 2, 3, 4]
    good = [r for r, i in enumerate(index) if r not in known and -5 <= i < 5 and table[i] > 0]
    assert got.rows.tolist() == good
    assert list(got.bad) == [r for r in range(ROWS) if r not in good]
    want = np.log(np.array([table[index[r]] for r in good], np.float32))
    if good:
        np.testing.assert_allclose(got.fields["std"], want, rtol=1e-6)
    for row, why in got.bad.items():
        if row in known:
            assert why == "known"
        elif not -5 <= index[row] < 5:
            assert "fails on this row" in why
        else:
            assert why == "the model gives no finite 'std' for this row"


def test_a_bound_may_be_infinite_but_not_nan(run: Callable[..., dict[str, Array]]) -> None:
    def bounds(inputs: Inputs) -> dict[str, Array]:
        return {"lower": run(inputs)["lower"]}

    got = answer(bounds, {"index": np.array([0, 1, 2])}, {}, 8)
    assert got.rows.tolist() == [0, 2]
    assert got.fields["lower"][0] == -np.inf
    assert got.bad == {1: "the model gives no finite 'lower' for this row"}


def test_only_fields_that_are_written_make_a_row_bad(run: Callable[..., dict[str, Array]]) -> None:
    inputs = {"index": np.array([0, 1, 2])}  # std is -inf, NaN and a number
    assert list(answer(run, inputs, {}, 8, ("lower",)).bad) == [1]
    assert list(answer(run, inputs, {}, 8, ("std", "lower")).bad) == [0, 1]
    none = answer(run, inputs, {}, 8, ())
    assert none.bad == {} and none.rows.tolist() == [0, 1, 2]
    assert set(none.fields) == {"std", "lower"}


@given(bad=st.sets(st.integers(0, 99), min_size=1, max_size=12))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_every_final_run_has_the_full_shape_and_good_rows_only(bad: set[int]) -> None:
    shapes = []

    def run(inputs: Inputs) -> dict[str, Array]:
        x = inputs["x"]
        if (x < 0).any():
            raise RuntimeError("negative")
        shapes.append(len(x))
        return {"mean": x * 2}

    x = np.arange(100.0)
    x[list(bad)] = -1
    got = answer(run, {"x": x}, {}, 32)
    assert got.fields["mean"].tolist() == [2.0 * r for r in range(100) if r not in bad]
    assert set(got.bad) == bad
    finals = [s for s in shapes if s in (32, 4)]
    assert finals.count(32) >= 3 and shapes[-1] == 4


def test_no_good_row_means_no_run() -> None:
    def never(inputs: object) -> dict[str, Array]:
        raise AssertionError("the model was run")

    got = answer(never, {"x": np.zeros(5)}, dict.fromkeys(range(5), "null"), 2)
    assert (got.fields, got.rows.tolist(), len(got.bad)) == ({}, [], 5)


def test_a_failure_of_no_single_row_is_the_models() -> None:
    def too_many(inputs: Inputs) -> dict[str, Array]:
        if len(inputs["x"]) == 8:
            raise RuntimeError("out of memory")
        return {"mean": inputs["x"]}

    with pytest.raises(ModelError, match=r"8 rows at once.*out of memory.*smaller batch"):
        answer(too_many, {"x": np.zeros(8)}, {}, 8)


def test_a_wrong_column_is_not_searched_for_rows() -> None:
    def refuse(inputs: object) -> dict[str, Array]:
        raise DataError("input 'x' has another shape")

    with pytest.raises(DataError, match="another shape"):
        answer(refuse, {"x": np.zeros(8)}, {}, 8)
