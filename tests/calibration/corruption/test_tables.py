"""Corruptions of tables against their definitions as slow loops, dtypes and columns by name."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.corruption import tables
from calibration.corruption.tables import measure
from posthoc.contract import DataError

EVERY: tuple[Callable[..., Any], ...] = (
    tables.missing,
    tables.noise,
    tables.scaled,
    tables.shuffled,
)
N = 2000


def table(dtype: str = "float64", n: int = N, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    columns = [rng.normal(3, 5, n), rng.gamma(2, 9, n), rng.integers(0, 2, n), rng.normal(0, 40, n)]
    return np.stack(columns, 1).round(2).astype(dtype)


numbers = st.one_of(
    *(
        hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=1, max_dims=2, max_side=6),
            elements=hnp.from_dtype(
                np.dtype(dtype),
                **({"allow_nan": True} if dtype.startswith("f") else {}),
                **({"min_value": -(2**53), "max_value": 2**53} if dtype == "int64" else {}),
            ),
        )
        for dtype in ("float16", "float32", "float64", "int8", "uint8", "int32", "int64")
    )
)


@settings(deadline=None, derandomize=True, max_examples=250)
@given(x=numbers, corruption=st.sampled_from(EVERY), severity=st.integers(1, 5))
def test_any_numbers_keep_dtype_shape_and_finiteness(
    x: np.ndarray, corruption: Callable[..., Any], severity: int
) -> None:
    flat = x.reshape(len(x), -1)
    if not np.isfinite(flat).any():
        with pytest.raises(DataError, match="no column has finite numbers"):
            corruption(x, severity)
        return
    got = corruption(x, severity)
    assert (got.dtype, got.shape) == (x.dtype, x.shape)
    for before, after in zip(flat.T, got.reshape(flat.shape).T, strict=True):
        assert np.isfinite(after[np.isfinite(before)]).all()
        if x.dtype.kind in "iu":
            assert before.min() <= after.min() and after.max() <= before.max()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
@pytest.mark.parametrize("corruption", EVERY)
def test_severities_never_undo_one_another(corruption: Callable[..., Any], dtype: str) -> None:
    x = table(dtype, 400)
    steps = [np.abs(corruption(x, s).astype(float) - x.astype(float)) for s in range(1, 6)]
    if corruption in (tables.missing, tables.shuffled):  # cells that are gone stay as they are
        for less, more in pairwise(steps):
            np.testing.assert_array_equal(more[less > 0], less[less > 0])
    means = [s.mean() for s in steps]
    assert all(0 < a < b for a, b in pairwise(means))


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_missing_cells_hold_the_median(severity: int) -> None:
    x = table()
    got = tables.missing(x, severity)
    share = tables.MISSING[severity - 1]
    for j, column in enumerate(x.T):
        middle = statistics.median_low(column.tolist())
        changed = got[:, j] != column
        assert (got[changed, j] == middle).all()
        count = changed.sum() + ((column == middle) * share).sum()
        assert count / N == pytest.approx(share, abs=4 * np.sqrt(share / N))
    holes = tables.missing(x, severity, fill="nan")
    gone = np.isnan(holes)
    np.testing.assert_array_equal(got[~gone], x[~gone])
    np.testing.assert_array_equal(holes[~gone], x[~gone])
    assert gone.mean() == pytest.approx(share, abs=4 * np.sqrt(share / N / 4))


def test_missing_is_nan_only_where_floats_are() -> None:
    with pytest.raises(DataError, match="input 'b' holds integers, and no integer is NaN"):
        tables.missing({"a": np.ones(3), "b": np.arange(3)}, 1, fill="nan")
    with pytest.raises(DataError, match="'median' or 'nan'"):
        tables.missing(np.ones(3), 1, fill="zero")  # type: ignore[arg-type]
    known = measure({"a": np.ones(9), "b": np.arange(9)}, columns=["a"])
    got = tables.missing({"a": np.ones(9), "b": np.arange(9)}, 5, reference=known, fill="nan")
    assert np.isnan(got["a"]).any() and (got["b"] == np.arange(9)).all()


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_noise_is_in_deviations_of_the_column(severity: int) -> None:
    x = table()
    x[:, 2] = 7  # a constant column has no deviation
    got = tables.noise(x, severity) - x
    for j in (0, 1, 3):
        ratio = got[:, j].std() / np.std(x[:, j])
        assert ratio == pytest.approx(tables.NOISE[severity - 1], rel=0.06)
        assert abs(got[:, j].mean()) < 0.1 * got[:, j].std()
    assert (got[:, 2] == 0).all()
    assert abs(np.corrcoef(got[:, 0], got[:, 1])[0, 1]) < 0.08


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_one_column_of_a_row_is_scaled(severity: int) -> None:
    x = np.abs(table()) + 1
    got = tables.scaled(x, severity)
    changed = got != x
    assert (changed.sum(1) == 1).all()
    np.testing.assert_allclose(got[changed], x[changed] * tables.FACTOR[severity - 1])
    assert changed.mean(0) == pytest.approx([0.25] * 4, abs=0.05)
    only = tables.scaled(x, severity, reference=measure(x, columns=[1]))
    assert ((only != x) == [False, True, False, False]).all()
    apart = {f"c{j}": x[:, j] for j in range(4)}
    named = tables.scaled(apart, severity)
    assert (sum((named[k] != apart[k]).astype(int) for k in apart) == 1).all()


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_shuffled_cells_come_from_the_column(severity: int) -> None:
    x = table()
    got = tables.shuffled(x, severity)
    for j in range(4):
        assert set(got[:, j]) <= set(x[:, j])
    share = tables.SHUFFLED[severity - 1]
    assert (got != x)[:, 3].mean() == pytest.approx(share, abs=4 * np.sqrt(share / N))
    assert got.mean(0) == pytest.approx(x.mean(0), abs=0.2 * x.std(0).max())


def test_places_drawn_are_those_of_the_ordered_column() -> None:
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 9, 100).astype(float)
    (column,) = measure(cells)[""]
    assert column is not None
    u = np.append(rng.random(500), [0.0, 1 - 2**-53])
    np.testing.assert_array_equal(column.at(u), np.sort(cells)[(u * 100).astype(int)])
    assert column.median == statistics.median_low(cells.tolist())
    assert column.deviation == pytest.approx(cells.std(), rel=1e-12)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(cells=st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=30))
def test_median_and_deviation_of_any_column(cells: list[float]) -> None:
    (column,) = measure(np.array(cells))[""]
    assert column is not None
    assert column.median == statistics.median_low(cells)
    unit = max(map(abs, cells)) or 1.0
    assert column.deviation / unit == pytest.approx(np.std(np.array(cells) / unit), abs=1e-9)


def test_columns_are_chosen_by_name() -> None:
    x = {"a": table(n=50)[:, 0], "m": table(n=50)}
    found = measure(x, columns=["a", "m[2]"])
    assert [c is not None for c in found["m"]] == [False, False, True, False]
    got = tables.noise(x, 5, reference=found)
    assert (got["a"] != x["a"]).all()
    assert ((got["m"] != x["m"]).any(0) == [False, False, True, False]).all()
    assert all(c is not None for c in measure(x, columns="m")["m"])
    with pytest.raises(DataError, match=r"there is no column b, m\[4\]"):
        measure(x, columns=["b", "m[4]", "a"])
    with pytest.raises(DataError, match=r"the input: no column has finite"):
        tables.noise(np.ones((3, 2)), 1, reference=measure(np.ones((3, 2)), columns=[]))


def test_cells_without_a_number_stay_without_one() -> None:
    x = table("float32", 60)
    x[::3, 0], x[1, 1], x[:, 3] = np.nan, np.inf, np.nan
    for corruption in EVERY[1:3]:
        got = corruption(x, 4)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
        assert got[1, 1] == np.inf
    assert np.isnan(tables.missing(x, 5)[:, 3]).all()


def test_tables_that_cannot_be_are_named() -> None:
    for corruption in EVERY:
        with pytest.raises(DataError, match="no tensor is N×D numbers"):
            corruption({"x": np.zeros((2, 2, 2))}, 1)
        with pytest.raises(DataError, match="input 'x' has no rows"):
            corruption({"x": np.zeros((0, 2))}, 1)
        with pytest.raises(DataError, match=r"input 'x': column 1 holds integers beyond 2\*\*53"):
            corruption({"x": np.array([[1, 2**60]])}, 1)
        with pytest.raises(DataError, match="input 'x' had 2 columns"):
            corruption({"x": np.zeros((3, 3))}, 1, reference=measure({"x": np.zeros((3, 2))}))
