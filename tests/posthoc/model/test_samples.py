"""Rows to open a model with, and what columns of unknown type may be."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posthoc.contract import DataError, ModelError, TensorSpec
from posthoc.model.samples import Givers, Samples, example


def written(folder, n=40, **columns):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3))
    made = {"a": x[:, 0], "b": x[:, 1], "i": np.arange(n), "j": np.arange(n)[::-1].copy(),
            "flag": np.arange(n) % 2 == 0, "list": pa.array(x.tolist()),
            "flags": pa.array((rng.random((n, 6)) < 0.5).tolist()),
            "ids": pa.array(rng.integers(0, 9, (n, 4)).tolist()), "y": np.arange(n) % 3,
            **columns}  # fmt: skip
    path = folder / "t.parquet"
    pq.write_table(pa.table(made), path)
    return path


def spec(dtype, *shape, name="x"):
    return TensorSpec(name=name, dtype=dtype, shape=(-1, *shape))


READINGS = {
    "several columns of fractions": (["a", "b"], [spec("float32", 2)]),
    "several columns of integers": (["i", "j"], [spec("int64", 2), spec("float32", 2)]),
    "integers and fractions": (["a", "i"], [spec("float32", 2)]),
    "integers and booleans": (["i", "flag"], [spec("int64", 2), spec("float32", 2)]),
    "one column of fractions": (["a"], [spec("float32", 1)]),
    "one column of integers": (["i"], [spec("int64"), spec("float32", 1)]),
    "lists of booleans": (["flags"], [spec("bool", 6), spec("float32", 6)]),
    "lists of fractions": (["list"], [spec("float32", 3)]),
    "lists of integers": (["ids"], [spec("int64", 4), spec("float32", 4)]),
}


@pytest.mark.parametrize("what", READINGS)
def test_what_columns_may_be(tmp_path, what):
    columns, want = READINGS[what]
    samples = Samples(written(tmp_path), "y", {"x": columns})
    found = list(samples.choices(["x"], "float32"))
    assert found == [(w,) for w in want]
    # Each reading is one that the table can be read by.
    for specs in found:
        rows = samples.rows(specs)
        assert rows["x"].dtype == specs[0].dtype and rows["x"].shape[1:] == specs[0].shape[1:]


def test_tensor_columns_keep_their_shape(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 2, 3)).astype(np.uint8)
    path = written(tmp_path, image=pa.FixedShapeTensorArray.from_numpy_ndarray(images))
    samples = Samples(path, "y", {"x": ["image"]})
    first, second = samples.choices(["x"], "float16")
    assert first == (spec("int64", 2, 3),) and second == (spec("float16", 2, 3),)
    np.testing.assert_array_equal(samples.rows(first)["x"], images[:32])


def test_several_inputs_are_read_in_every_combination(tmp_path):
    samples = Samples(written(tmp_path), "y", {"u": ["i"], "v": ["ids"], "w": ["a"]})
    found = [tuple(s.dtype for s in c) for c in samples.choices(["u", "v", "w"], "float32")]
    assert found == [
        ("int64", "int64", "float32"),
        ("int64", "float32", "float32"),
        ("float32", "int64", "float32"),
        ("float32", "float32", "float32"),
    ]


def test_lists_beside_numbers_are_refused(tmp_path):
    samples = Samples(written(tmp_path), "y", {"x": ["a", "list"]})
    with pytest.raises(DataError, match="'x' takes one column of lists or several of numbers"):
        samples.choices(["x"], "float32")


def test_rows_are_distinct_and_without_faults(tmp_path):
    a = np.repeat(np.arange(12.0), 5)
    a[::7] = np.nan
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": a, "y": np.zeros(60, int)}), path)
    rows = Samples(path, "y").rows([spec("float32", 1)])["x"]
    np.testing.assert_array_equal(rows[:, 0], np.arange(12))
    assert Samples(path, "y").rows([spec("float32", 1, name="a")]) is not None


def test_too_few_rows_are_none(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": np.arange(50) % 7 / 2, "y": np.zeros(50, int)}), path)
    samples = Samples(path, "y")
    assert samples.rows([spec("float32", 1)]) is None
    with pytest.raises(ModelError, match=r"t\.parquet has too few, so give some with --example"):
        Givers(samples, None, "").needed([spec("float32", 1)])


def test_the_table_is_opened_when_it_is_needed(tmp_path):
    samples = Samples(tmp_path / "never.parquet", "y")
    with pytest.raises(DataError, match="no such file"):
        samples.rows([spec("float32", 1)])


# ---- examples


def test_an_example_says_what_its_inputs_are(tmp_path):
    path = tmp_path / "e.npz"
    np.savez(path, x=np.zeros((9, 2, 3), np.float32), m=np.ones((9, 2), np.int64))
    givers = Givers(None, example(path), str(path))
    assert list(givers.readings(["x", "m"], "float32", ())) == [
        (spec("float32", 2, 3), spec("int64", 2, name="m"))
    ]
    assert givers.known([spec("float64", 2, -1)])["x"].dtype == np.float64
    with pytest.raises(ModelError, match=r"has no array for input 'z'"):
        givers.known([spec("float32", name="z")])
    with pytest.raises(ModelError, match=r"holds float32 rows of shape \(2, 3\), the model takes"):
        givers.known([spec("float32", 2, 4)])
    with pytest.raises(ModelError, match="the model takes int64"):
        givers.known([spec("int64", 2, 3)])
    with pytest.raises(ModelError, match="no array for input k"):
        givers.readings(["x", "k"], "float32", ())


def test_the_tables_rows_come_before_those_of_the_example(tmp_path):
    samples = Samples(written(tmp_path), "y", {"x": ["a", "b"]})
    given = {"x": np.zeros((9, 2), np.float32)}
    [reading] = Givers(samples, given, "e.npz").readings(["x"], "float32", ())
    assert reading == (spec("float32", 2),)
    rows = Givers(samples, given, "e.npz").needed(reading)
    assert len(rows["x"]) == 32 and np.abs(rows["x"]).min() > 0


BROKEN = {
    "cut": lambda p: p.write_bytes(whole(p)[:100]),
    "text": lambda p: p.write_text("hello"),
    "objects": lambda p: np.savez(p, x=np.array([{}, 1], object)),
    "an array": lambda p: p.write_bytes(one_array()),
    "no rows": lambda p: np.savez(p, x=np.zeros((0, 3))),
    "other lengths": lambda p: np.savez(p, x=np.zeros((2, 3)), m=np.zeros(3)),
    "text inside": lambda p: np.savez(p, x=np.array(["a", "b"])),
    "nothing": lambda p: None,
}


def one_array():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def whole(path):
    np.savez(path, x=np.zeros((50, 30)))
    return path.read_bytes()


@pytest.mark.parametrize("how", BROKEN)
def test_an_example_that_is_none_is_refused_by_name(tmp_path, how):
    path = tmp_path / "e.npz"
    BROKEN[how](path)
    with pytest.raises(ModelError, match=r"e\.npz (is not an \.npz|must hold numbers)"):
        example(path)
