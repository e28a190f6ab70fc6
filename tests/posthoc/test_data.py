"""Columns as tensors against plain Python loops over the same values."""

import hashlib
import math
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc.contract import DataError
from posthoc.data import TableMapping, infer_mapping, split_roles
from tests.posthoc.batches import rows_of, spec

# ---- mapping


ONE = [spec("x", "float32", 3)]
TWO = [spec("u", "float32", 2), spec("w", "float32")]


def test_one_input_takes_every_column_that_is_not_spoken_for():
    m = infer_mapping(
        ["a", "y", "b", "g", "c", "i", "s"], ONE, target="y", group="g", id="i", split_by="s"
    )
    assert m == TableMapping(
        inputs={"x": ("a", "b", "c")}, target=("y",), group="g", id="i", split_by="s"
    )
    assert m.columns() == ("a", "b", "c", "y", "g", "s", "i")
    assert m.columns(target=False) == ("a", "b", "c", "g", "s", "i")


def test_a_column_of_the_inputs_own_name_wins():
    assert infer_mapping(["a", "x"], ONE, target=None).inputs == {"x": ("x",)}
    assert infer_mapping(["w", "a", "u"], TWO, target=["a"]).inputs == {"u": ("u",), "w": ("w",)}


def test_what_the_caller_says_wins_over_names():
    m = infer_mapping(["a", "b", "w"], TWO, target=None, inputs={"u": ["b", "a"]})
    assert m.inputs == {"u": ("b", "a"), "w": ("w",)}


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"target": "q"}, "no column 'q'; the table has a, b"),
        ({"target": None, "group": "q"}, "no column 'q'"),
        ({"target": None, "inputs": {"u": ["q"]}}, "no column 'q'"),
        ({"target": None, "inputs": {"q": ["a"]}}, "no input 'q'; it takes u, w"),
        ({"target": None}, "input 'u' has no column; name them with --inputs u=a,b,c"),
    ],
)
def test_a_mapping_that_cannot_be_says_why(kwargs, why):
    with pytest.raises(DataError, match=why):
        infer_mapping(["a", "b"], TWO, **kwargs)


def test_inputs_only_forgets_every_other_column():
    full = TableMapping(inputs={"x": ("a", "b")}, target=("y",), group="g", split_by="s", id="i")
    assert full.inputs_only() == TableMapping(inputs={"x": ("a", "b")})
    assert full.inputs_only().columns() == ("a", "b")


def test_a_mapping_is_saved_and_read_as_json():
    m = TableMapping(inputs={"x": ("a", "b")}, target=("y",), split_by="s")
    assert TableMapping.model_validate_json(m.model_dump_json()) == m


# ---- rows


def test_scalar_columns_are_stacked_in_the_order_of_the_mapping():
    batch = {"a": [1, 2], "b": [0.5, 0.25], "c": [True, False]}
    mapping = TableMapping(inputs={"x": ("c", "a", "b")})
    rows = rows_of(batch, ONE, mapping)
    np.testing.assert_array_equal(rows.inputs["x"], np.array([[1, 1, 0.5], [0, 2, 0.25]], "f4"))
    assert rows.inputs["x"].dtype == np.float32
    assert rows.bad == {} and len(rows) == 2
    square = rows_of({k: [1.0] for k in "abcd"}, [spec("x", "float64", 2, -1)]).inputs["x"]
    assert square.shape == (1, 2, 2)


VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
STORED = {
    "list": pa.array(VALUES.reshape(2, 12).tolist(), pa.list_(pa.float64())),
    "large_list": pa.array(VALUES.reshape(2, 12).tolist(), pa.large_list(pa.float32())),
    "fixed": pa.array(VALUES.reshape(2, 12).tolist(), pa.list_(pa.float32(), 12)),
    "nested": pa.array(VALUES.tolist(), pa.list_(pa.list_(pa.int64()))),
    "nested_fixed": pa.array(VALUES.tolist(), pa.list_(pa.list_(pa.float16(), 4), 3)),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(VALUES),
    "permuted": pa.FixedShapeTensorArray.from_numpy_ndarray(VALUES.transpose(0, 2, 1).copy()),
}
STORED["permuted"] = pa.ExtensionArray.from_storage(
    pa.fixed_shape_tensor(pa.float32(), [4, 3], permutation=[1, 0]), STORED["permuted"].storage
)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tail", [(3, 4), (1, 3, 4), (-1, 4), (3, -1)])
def test_every_way_to_store_a_tensor_gives_the_same_rows(stored, tail):
    column = STORED[stored]
    for batch in (
        pa.record_batch({"x": column}),
        pa.record_batch({"x": pa.concat_arrays([column, column])}).slice(1, 2),
    ):
        rows = rows_of(batch, [spec("x", "float32", *tail)])
        want = VALUES if batch.column(0).offset == 0 else VALUES[::-1]
        assert rows.bad == {}
        np.testing.assert_array_equal(rows.inputs["x"].reshape(2, 3, 4), want)
        assert rows.inputs["x"].shape == (2, *(1,) * (len(tail) - 2), 3, 4)


def test_null_rows_of_tensor_columns_are_bad_and_keep_their_place():
    storage = pa.FixedSizeListArray.from_arrays(
        pa.array(VALUES[:1].repeat(3, 0).ravel()), 12, mask=pa.array([False, True, False])
    )
    column = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [3, 4]), storage)
    rows = rows_of(pa.record_batch({"x": column}), [spec("x", "float32", 3, 4)])
    assert rows.bad == {1: "column 'x': is null"}
    np.testing.assert_array_equal(rows.inputs["x"], VALUES[:1].repeat(3, 0) * [[[1]], [[0]], [[1]]])


@pytest.mark.parametrize(
    ("column", "dtype", "tail", "fault"),
    [
        ([1.0, None, 3.0], "float32", (), "is null"),
        ([1.0, math.nan, 3.0], "float32", (), "is nan; only finite numbers can be used"),
        ([1.0, math.inf, 3.0], "float64", (), "is inf; only finite numbers can be used"),
        ([1.0, 1e39, 3.0], "float32", (), "is 1e+39, which float32 cannot hold"),
        ([1, 300, 3], "int8", (), "is 300, which int8 cannot hold"),
        ([1, -1, 3], "uint16", (), "is -1, which uint16 cannot hold"),
        ([1.0, 1.5, 3.0], "int64", (), "is 1.5, which int64 cannot hold"),
        ([1.0, 2.0**63, 3.0], "int64", (), "cannot hold"),
        ([1, 2, 1], "bool", (), "is 2, which bool cannot hold"),
        ([1.0, math.nan, 1.0], "int32", (), "is nan; only finite numbers can be used"),
        ([[1.0, 2], [1.0], [3, 4]], "float32", (2,), "has 1 values in a list, expected 2"),
        ([[1.0, 2], None, [3, 4]], "float32", (2,), "is null"),
        ([[1.0, 2], [1, None], [3, 4]], "float32", (2,), "[1] is null"),
        ([[1.0, 2], [1, math.nan], [3, 4]], "float32", (2,), "[1] is nan"),
        ([[1.0, 2], [1.0], [3, 4]], "float32", (-1,), "has 1 values in a list, expected 2"),
        ([[[1.0], [2]], [[1], [2, 3]], [[3], [4]]], "float32", (2, 1), "[1] has 2 values"),
        ([[[1.0], [2]], [[1], None], [[3], [4]]], "float32", (2, 1), "[1] is null"),
        ([[[1.0], [2]], [[1], [None]], [[3], [4]]], "float32", (2, 1), "[1][0] is null"),
    ],
)
def test_the_fault_of_one_row_stays_with_that_row(column, dtype, tail, fault):
    rows = rows_of({"x": column}, [spec("x", dtype, *tail)])
    assert list(rows.bad) == [1]
    assert rows.bad[1].startswith(f"column 'x': {fault}") or fault in rows.bad[1]
    for i in (0, 2):
        np.testing.assert_array_equal(rows.inputs["x"][i], np.asarray(column[i], dtype))
    assert not rows.inputs["x"][1].any()


def test_a_bad_row_is_zero_in_every_input_and_the_first_fault_is_kept():
    specs = [spec("u", "float32", 2), spec("w", "int64")]
    mapping = TableMapping(inputs={"u": ("a", "b"), "w": ("w",)}, target=("y",))
    batch = {"a": [1.0, None], "b": [1.0, math.nan], "w": [5, 6], "y": [1, 1]}
    rows = rows_of(batch, specs, mapping, task="classification")
    assert rows.bad == {1: "column 'a': is null"}
    assert rows.inputs["u"].tolist() == [[1, 1], [0, 0]]
    assert rows.inputs["w"].tolist() == [5, 0]
    assert rows.y.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("column", "tail", "why"),
    [
        (["a", "b"], (), "column 'x': expected float32 for input 'x', found string; in a fit"),
        ([["a"], ["b"]], (1,), r"column 'x': expected float32 of shape 1, found list<.*string>"),
        (STORED["fixed"], (), "expected one float32 a row, found fixed_size_list"),
        ([1.0, 2.0], (3,), "column 'x': expected float32 of shape 3, found double"),
        (STORED["fixed"], (7,), "expected float32 of shape 7, found fixed_size_list.*shape 12"),
        (STORED["tensor"], (4, 3), "expected float32 of shape 4×3, found .* of shape 3×4"),
        (STORED["list"], (-1, -1), "expected float32 of shape any×any"),
    ],
)
def test_the_fault_of_a_column_names_it_what_was_expected_and_found(column, tail, why):
    with pytest.raises(DataError, match=why):
        rows_of(
            {"x": pa.array(column) if isinstance(column, list) else column},
            [spec("x", "float32", *tail)],
        )


def test_too_few_columns_and_a_missing_one():
    with pytest.raises(DataError, match=r"input 'x' takes 3 values a row and 2 columns fill it"):
        rows_of({"a": [1.0], "b": [1.0]}, ONE)
    with pytest.raises(DataError, match=r"column 'b' \(input 'x'\) is missing; the table has a"):
        rows_of({"a": [1.0]}, ONE, TableMapping(inputs={"x": ("a", "b", "c")}))
    with pytest.raises(DataError, match="which columns make input 'x'"):
        rows_of({"a": [1.0]}, ONE, TableMapping(inputs={}))


def test_decimals_dictionaries_and_half_floats_are_numbers():
    batch = {
        "d": pa.array([Decimal("1.5"), None]),
        "k": pa.array([3, 4]).dictionary_encode(),
        "h": pa.array([np.float16(2), None], pa.float16()),
    }
    rows = rows_of(batch, ONE)
    np.testing.assert_array_equal(rows.inputs["x"], [[1.5, 3, 2], [0, 0, 0]])
    assert rows.bad == {1: "column 'd': is null"}


@pytest.mark.parametrize("rows", [0, 1])
def test_batches_of_no_row_and_one_row(rows):
    batch = pa.record_batch({"x": STORED["list"]}).slice(0, rows)
    got = rows_of(batch, [spec("x", "float32", 3, 4)])
    assert got.inputs["x"].shape == (rows, 3, 4)
    assert len(got) == len(got.split_keys) == rows


NUMBER = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 1, -1, 127, 128, -128, -129, 255, 256, 2**31 - 1, 2**31, 2**63 - 1]),
)
REAL = st.one_of(
    st.none(),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1.0, 127.0, 128.0, 2.0**31, 2.0**63, -(2.0**63), 1e39, 0.5]),
)


def holds(value, dtype):
    """Whether ``dtype`` can hold a Python number, by arithmetic on Python's own numbers."""
    if value is None or not math.isfinite(value):
        return False
    if np.dtype(dtype).kind == "f":
        # Largest finite value plus half a step rounds to infinity.
        info = np.finfo(dtype)
        step = int(info.max) - int(np.nextafter(info.max, np.dtype(dtype).type(0)))
        return abs(value) < int(info.max) + step // 2 if info.bits < 64 else True
    low, high = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return value == int(value) and int(low) <= int(value) <= int(high)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.one_of(st.lists(NUMBER, min_size=1, max_size=8), st.lists(REAL, min_size=1, max_size=8)),
    st.sampled_from(["int8", "uint8", "int32", "int64", "uint64", "bool", "float32", "float64"]),
)
def test_a_value_is_kept_or_its_row_is_bad(values, dtype):
    reals = any(isinstance(v, float) for v in values)
    column = pa.array(values, pa.float64() if reals else pa.int64())
    rows = rows_of({"x": column}, [spec("x", dtype)])
    for i, v in enumerate(values):
        v = None if v is None else float(v) if reals else v
        assert (i not in rows.bad) == holds(v, dtype)
        if i not in rows.bad:
            assert rows.inputs["x"][i] == np.dtype(dtype).type(v)


# ---- targets and meta columns


MAPPED = TableMapping(inputs={"x": ("x",)}, target=("y",))
X = [spec("x")]


def test_class_names_are_looked_up_and_unknown_ones_are_bad_rows():
    batch = pa.record_batch({"x": [1.0] * 4, "y": ["b", "z", None, "a"]})
    for column in (batch, batch.set_column(1, "y", batch.column(1).dictionary_encode())):
        rows = rows_of(column, X, MAPPED, task="classification", classes=["a", "b"])
        assert rows.y.dtype == np.int64 and rows.y.tolist() == [1, 0, 0, 0]
        assert rows.bad == {
            1: "column 'y': is 'z', which is not one of the classes",
            2: "column 'y': is null",
        }
    with pytest.raises(DataError, match="give the class names in output order with --classes"):
        rows_of(batch, X, MAPPED, task="classification")


@pytest.mark.parametrize("kwargs", [{"n_classes": 3}, {"classes": ["a", "b", "c"]}])
def test_class_indices_lie_below_the_number_of_classes(kwargs):
    batch = {"x": [1.0] * 4, "y": [0.0, 2.0, 3.0, -1.0]}
    rows = rows_of(batch, X, MAPPED, task="classification", **kwargs)
    assert rows.y.tolist() == [0, 2, 0, 0]
    assert rows.bad == {
        2: "column 'y': is 3, not a class index below 3",
        3: "column 'y': is -1, not a class index below 3",
    }


def test_regression_targets_are_n_by_k():
    batch = {"x": [1.0, 2.0], "y": [3, None], "w": [0.5, 0.25], "l": [[1.0, 2.0], [3.0, 4.0]]}
    one = rows_of(batch, X, MAPPED, task="regression")
    assert one.y.tolist() == [[3], [0]] and one.y.dtype == np.float64
    assert one.bad == {1: "column 'y': is null"}
    several = MAPPED.model_copy(update={"target": ("w", "x")})
    assert rows_of(batch, X, several, task="regression").y.tolist() == [[0.5, 1], [0.25, 2]]
    listed = MAPPED.model_copy(update={"target": ("l",)})
    assert rows_of(batch, X, listed, task="regression").y.tolist() == [[1, 2], [3, 4]]


def test_targets_that_are_absent_or_not_wanted():
    assert rows_of({"x": [1.0]}, X, MAPPED, task="regression").y is None
    assert rows_of({"x": [1.0], "y": [1.0]}, X, MAPPED).y is None
    with pytest.raises(DataError, match=r"column 'y' \(target\) is missing"):
        rows_of({"x": [1.0]}, X, MAPPED, task="regression", need_target=True)
    untargeted = TableMapping(inputs={"x": ("x",)})
    with pytest.raises(DataError, match="give --target"):
        rows_of({"x": [1.0]}, X, untargeted, task="regression", need_target=True)
    two = MAPPED.model_copy(update={"target": ("x", "y")})
    with pytest.raises(DataError, match="one target column"):
        rows_of({"x": [1.0], "y": [1.0]}, X, two, task="classification")


def test_ids_groups_and_split_keys():
    mapping = TableMapping(inputs={"x": ("x",)}, id="i", group="g", split_by="s")
    batch = {
        "x": [1.0, 2.0, 3.0, 3.0],
        "i": [7, 8, 9, 10],
        "g": [1, 2, 1, None],
        "s": ["u", "v", "u", "w"],
    }
    rows = rows_of(batch, X, mapping)
    assert rows.ids == ["7", "8", "9", "10"]
    assert rows.groups.tolist() == [1, 2, 1, 0] and rows.groups.dtype == np.int64
    assert rows.bad == {3: "column 'g': is null"}
    assert rows.split_keys[0] == rows.split_keys[2] != rows.split_keys[1]
    named = rows_of({**batch, "g": ["p", "q", "p", "q"]}, X, mapping)
    assert named.groups.tolist() == ["p", "q", "p", "q"]


def test_hashes_are_of_the_input_bytes_alone():
    specs = [spec("u", "float32", 2), spec("w", "int16")]
    mapping = TableMapping(inputs={"u": ("u",), "w": ("w",)})
    batch = {"u": [[1.0, 2.0], [1.0, 3.0], [1.0, 2.0]], "w": [4, 4, 4]}
    rows = rows_of(batch, specs, mapping)
    for i in range(3):
        raw = np.asarray(batch["u"][i], "<f4").tobytes() + np.asarray(4, "<i2").tobytes()
        want = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
        assert int(rows.content_hashes[i]) == want
    np.testing.assert_array_equal(rows.split_keys, rows.content_hashes)
    stored_otherwise = {"u": pa.array(batch["u"], pa.list_(pa.float64(), 2)), "w": [4.0, 4.0, 4.0]}
    np.testing.assert_array_equal(
        rows_of(stored_otherwise, specs, mapping).content_hashes, rows.content_hashes
    )


# ---- roles


FRACTIONS = {"module": 0.2, "calibration": 0.2, "conformal": 0.3, "test": 0.3}


def keys(n=20_000):
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(str(i).encode(), digest_size=8).digest(), "little")
            for i in range(n)
        ],
        np.uint64,
    )


def test_roles_have_their_shares_and_equal_keys_share_one():
    k = keys()
    roles = split_roles(k, FRACTIONS, seed=0)
    assert roles.dtype == np.int8 and set(roles.tolist()) == {0, 1, 2, 3}
    for role, share in enumerate(FRACTIONS.values()):
        spread = math.sqrt(share * (1 - share) / len(k))
        assert abs((roles == role).mean() - share) < 4 * spread
    order = np.random.default_rng(0).permutation(len(k))
    np.testing.assert_array_equal(split_roles(k[order], FRACTIONS, 0), roles[order])
    np.testing.assert_array_equal(split_roles(k[:5].repeat(3), FRACTIONS, 0), roles[:5].repeat(3))


def test_other_seeds_are_independent_splits():
    """Roles under two seeds agree as often as independent ones do: sum of squared shares."""
    k = keys()
    expected = sum(s * s for s in FRACTIONS.values())
    spread = math.sqrt(expected * (1 - expected) / len(k))
    splits = [split_roles(k, FRACTIONS, seed) for seed in (0, 1, 2, 2**32, -1)]
    for i, a in enumerate(splits):
        for b in splits[:i]:
            assert abs((a == b).mean() - expected) < 4.5 * spread


def test_small_consecutive_keys_are_spread_too():
    roles = split_roles(np.arange(10_000, dtype=np.uint64), {"a": 0.5, "b": 0.5}, 0)
    assert abs(roles.mean() - 0.5) < 4 * 0.5 / 100


@pytest.mark.parametrize(
    "fractions", [{}, {"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}]
)
def test_fractions_that_do_not_make_a_split_are_refused(fractions):
    with pytest.raises(DataError, match="positive and sum to 1"):
        split_roles(keys(3), fractions, 0)
