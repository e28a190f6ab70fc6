"""The cache against a plain loop over batches, and its life after a real SIGKILL."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper, numpy_helper

import posthoc.features
import posthoc.filling
import posthoc.slices
from posthoc.contract import DataError, ModelError
from posthoc.data import infer_mapping, open_table, to_rows
from posthoc.features import build_cache, default_cache_dir, estimated_bytes
from posthoc.frozen import expose, open_frozen
from posthoc.model.memory import row_bytes

D, C, K = 3, 5, 4
N = 250
ROOT = Path(__file__).resolve().parents[2]


def network(path, *, body="Tanh", tail="Softmax", outputs=K):
    rng = np.random.default_rng(0)
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("MatMul", ["x", "w1"], ["h"]),
            node(body, ["h"], ["phi"]),
            node("MatMul", ["phi", "w2"], ["z"]),
            node(tail, ["z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", D])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", outputs])],
        [
            numpy_helper.from_array(rng.normal(size=(D, C)).astype("f4"), "w1"),
            numpy_helper.from_array(rng.normal(size=(C, outputs)).astype("f4"), "w2"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    path.write_bytes(made.SerializeToString())
    return path


def write_rows(path, n=N, **columns):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, D))
    data = {f"x{i}": x[:, i] for i in range(D)} | {"y": rng.integers(0, K, n)} | columns
    pq.write_table(pa.table(data), path, row_group_size=37)
    return path


@pytest.fixture
def case(tmp_path):
    """A frozen classifier, a table of 250 rows, the mapping between them, a cache folder."""
    frozen = open_frozen(network(tmp_path / "m.onnx"), task="classification")
    table = open_table(write_rows(tmp_path / "t.parquet"))
    mapping = infer_mapping(table.columns, frozen.inputs, target="y")
    return frozen, table, mapping, tmp_path / "cache"


def build(case, **kwargs):
    frozen, table, mapping, cache_dir = case
    options = {"task": "classification", "cache_dir": cache_dir, "batch_size": 32, "threads": 1}
    return build_cache(frozen, table, mapping, **(options | kwargs))


def looped(frozen, table, mapping, batch_size=32):
    """φ and z batch by batch, straight from ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(expose(frozen), options, providers=["CPUExecutionProvider"])
    names = [n for n in (frozen.phi, frozen.z) if n]
    outputs = [
        session.run(names, to_rows(b, mapping, frozen.inputs).inputs)
        for b in table.batches(batch_size)
    ]
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def test_the_cache_holds_what_the_model_gives_row_by_row(case):
    frozen, table, mapping, _ = case
    seen = []
    cache = build(case, progress=lambda done, total: seen.append((done, total)))
    phi, z = looped(frozen, table, mapping)
    np.testing.assert_array_equal(cache.phi, phi)
    np.testing.assert_array_equal(cache.z, z)
    np.testing.assert_array_equal(cache.y, column(table, "y"))
    assert cache.n_rows == N and cache.bad == {} and cache.groups is None
    assert isinstance(cache.z, np.memmap) and cache.z.dtype == np.float32
    assert seen[0] == (0, N) and seen[-1] == (N, N) and seen == sorted(seen)
    rows = to_rows(next(table.batches(N)), mapping, frozen.inputs)
    np.testing.assert_array_equal(cache.split_keys, rows.split_keys)
    np.testing.assert_array_equal(cache.content_hashes, rows.content_hashes)
    assert sorted(p.name for p in cache.path.iterdir()) == [
        ".lock", "meta.parquet", "phi.npy", "z.npy",
    ]  # fmt: skip


def test_rows_that_are_large_inside_are_run_fewer_at_once(case, monkeypatch):
    frozen, table, mapping, _ = case
    rows = to_rows(next(table.batches(1)), mapping, frozen.inputs)
    inside = row_bytes(onnx.load_from_string(expose(frozen)), rows.inputs)
    monkeypatch.setattr(posthoc.slices, "MOST_BYTES", 7 * inside + 1)
    seen = []
    cache = build(case, progress=lambda done, total: seen.append(done))
    assert seen == [0, *range(7, N, 7), N, N]
    phi, z = looped(frozen, table, mapping)
    np.testing.assert_allclose(cache.phi, phi, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cache.z, z, rtol=1e-5, atol=1e-6)


def column(table, name):
    return np.concatenate([b.column(name).to_numpy() for b in table.batches(100, [name])])


def test_take_and_blocks_follow_the_rows_asked_for(case):
    cache = build(case)
    rows = np.array([200, 3, 3, 77, 0])
    taken = cache.take(rows)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(taken.phi[i], cache.phi[row])
        np.testing.assert_array_equal(taken.z[i], cache.z[row])
        assert taken.y[i] == cache.y[row]
    assert not isinstance(taken.z, np.memmap)
    blocks = list(cache.blocks(rows, 2))
    assert [len(b) for b in blocks] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([b.z for b in blocks]), taken.z)
    assert len(cache.take(rows[:0])) == 0


def test_a_complete_cache_is_opened_without_the_model(case, monkeypatch):
    first = build(case)

    def never(*args, **kwargs):
        raise AssertionError("the model was opened")

    monkeypatch.setattr(posthoc.filling, "open_session", never)
    seen = []
    again = build(case, progress=lambda *a: seen.append(a))
    assert again.path == first.path and seen == [(N, N)]
    np.testing.assert_array_equal(again.z, first.z)
    np.testing.assert_array_equal(again.y, first.y)


def test_whatever_moves_the_numbers_makes_another_cache(case, tmp_path):
    frozen, table, mapping, cache_dir = case
    paths = [build(case).path, build(case, batch_size=16).path, build(case, classes="abcd").path]
    other = mapping.model_copy(update={"inputs": {"x": ("x1", "x0", "x2")}})
    paths.append(build((frozen, table, other, cache_dir)).path)
    longer = open_table(write_rows(tmp_path / "t2.parquet", N + 1))
    paths.append(build((frozen, longer, mapping, cache_dir)).path)
    relu = open_frozen(network(tmp_path / "m2.onnx", body="Relu"), task="classification")
    paths.append(build((relu, table, mapping, cache_dir)).path)
    assert len(set(paths)) == len(paths)
    assert build(case).path == paths[0]


def test_bad_rows_are_kept_apart_with_their_reason(case, tmp_path):
    frozen, _, mapping, cache_dir = case
    y = [0, None, 9, *[1] * (N - 3)]
    path = write_rows(tmp_path / "bad.parquet", y=pa.array(y))
    data = pq.read_table(path)
    x0 = data["x0"].to_numpy().copy()
    x0[40] = np.nan
    pq.write_table(data.set_column(0, "x0", pa.array(x0)), path)
    cache = build((frozen, open_table(path), mapping, cache_dir))
    assert cache.bad == {
        1: "column 'y': is null",
        2: "column 'y': is 9, not a class index below 4",
        40: "column 'x0': is nan; only finite numbers can be used",
    }
    np.testing.assert_array_equal(cache.usable, np.setdiff1d(np.arange(N), [1, 2, 40]))
    assert not cache.z[[1, 2, 40]].any() and not cache.phi[[1, 2, 40]].any()
    assert np.isfinite(cache.z).all() and cache.z[cache.usable].any(axis=1).all()


def test_rows_for_which_the_model_gives_nan_or_inf_are_bad(tmp_path):
    """Features log(h) of rows with a negative h are NaN."""
    frozen = open_frozen(
        network(tmp_path / "m.onnx", body="Log"),
        task="classification",
    )
    table = open_table(write_rows(tmp_path / "t.parquet"))
    mapping = infer_mapping(table.columns, frozen.inputs, target="y")
    values = looped(frozen, table, mapping)
    broken = np.flatnonzero(~np.isfinite(np.concatenate(values, axis=1)).all(axis=1))
    assert 0 < len(broken) < N
    cache = build((frozen, table, mapping, tmp_path / "cache"))
    assert sorted(cache.bad) == broken.tolist()
    assert all("NaN or Inf" in reason for reason in cache.bad.values())
    assert np.isfinite(cache.z).all() and not cache.z[broken].any()


def test_a_black_box_regression_with_groups_and_two_targets(tmp_path):
    frozen = open_frozen(network(tmp_path / "m.onnx", tail="Relu", outputs=2), task="regression")
    assert frozen.phi is None
    rng = np.random.default_rng(0)
    groups = rng.choice(["north", "south"], N)
    u, v = rng.normal(size=(2, N))
    table = open_table(write_rows(tmp_path / "t.parquet", u=u, v=v, g=groups))
    mapping = infer_mapping(
        table.columns, frozen.inputs, target=["u", "v"], group="g", inputs={"x": ["x0", "x1", "x2"]}
    )
    case = (frozen, table, mapping, tmp_path / "cache")
    for _ in range(2):
        cache = build(case, task="regression")
        assert cache.phi is None and cache.take(np.arange(3)).phi is None
        np.testing.assert_array_equal(cache.y, np.stack([u, v], axis=1))
        np.testing.assert_array_equal(cache.groups, groups)
        np.testing.assert_array_equal(cache.z, looped(frozen, table, mapping)[0])


def test_rows_without_a_target_column_have_no_labels(case, tmp_path):
    frozen, _, mapping, cache_dir = case
    path = tmp_path / "unlabelled.parquet"
    pq.write_table(pq.read_table(tmp_path / "t.parquet").drop(["y"]), path)
    cache = build((frozen, open_table(path), mapping, cache_dir))
    assert cache.y is None and cache.take(np.arange(3)).y is None
    np.testing.assert_array_equal(cache.z, build(case).z)


def test_sizes_are_estimated_before_anything_is_written(case):
    frozen, table, mapping, cache_dir = case
    assert estimated_bytes(frozen, 1_000_000) == pytest.approx(4e6 * (C + K), rel=1)
    large = 10**15
    wide = dataclasses.replace(frozen, z_dim=large)
    with pytest.raises(DataError, match=r"the cache of 250 rows takes 1e\+06 TB and .* left"):
        build((wide, table, mapping, cache_dir))
    with pytest.raises(DataError, match=r"takes 17 kB, more than the 1 kB allowed; raise --max-c"):
        build(case, max_bytes=1000)
    assert not cache_dir.exists()
    cache = build(case, max_bytes=estimated_bytes(frozen, N))
    used = sum(f.stat().st_size for f in cache.path.iterdir())
    assert used < estimated_bytes(frozen, N) + 8000  # headers of small files


def test_class_names_must_be_as_many_as_the_classes(case):
    with pytest.raises(DataError, match="3 class names for a model with 4 classes"):
        build(case, classes=["a", "b", "c"])


def test_a_model_that_fails_half_way_names_the_rows(case, tmp_path):
    """Rows of a Gather whose index lies outside the table."""
    node = helper.make_node
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [node("Gather", ["t", "i"], ["phi"]), node("MatMul", ["phi", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", K])],
        [
            numpy_helper.from_array(rng.normal(size=(10, C)).astype("f4"), "t"),
            numpy_helper.from_array(rng.normal(size=(C, K)).astype("f4"), "w"),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    frozen = open_frozen(made.SerializeToString(), task="classification")
    np.savez(tmp_path / "t.npz", i=np.r_[np.zeros(40, int), 99])
    table = open_table(tmp_path / "t.npz")
    mapping = infer_mapping(table.columns, frozen.inputs, target=None)
    with pytest.raises(ModelError, match=r"fails on rows 32 to 40 of .*t\.npz"):
        build((frozen, table, mapping, tmp_path / "cache"))


CHILD = """
import os, signal, sys
import posthoc.features
from posthoc.data import infer_mapping, open_table
from posthoc.frozen import open_frozen

model, rows, cache, kill_at = sys.argv[1:]
posthoc.features._SHARD_ROWS = 64
frozen = open_frozen(model, task="classification")
table = open_table(rows)
mapping = infer_mapping(table.columns, frozen.inputs, target="y")

def progress(done, total):
    if done >= int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)

posthoc.features.build_cache(frozen, table, mapping, task="classification", cache_dir=cache,
                             batch_size=32, threads=1, progress=progress)
"""


def child(tmp_path, kill_at):
    command = [sys.executable, "-c", CHILD, "m.onnx", "t.parquet", "cache", str(kill_at)]
    return subprocess.Popen(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("kill_at", [0, 32, 96, 128, 160, 224, 250])
def test_a_killed_build_goes_on_from_its_finished_shards(kill_at, case, tmp_path, monkeypatch):
    monkeypatch.setattr(posthoc.features, "_SHARD_ROWS", 64)
    want = build(case, cache_dir=tmp_path / "uninterrupted")
    assert child(tmp_path, kill_at).wait(60) == -signal.SIGKILL
    [path] = (tmp_path / "cache").iterdir()
    finished = kill_at // 64 if kill_at < N else 4
    assert len(list(path.glob("rows-*.parquet"))) == finished
    seen = []
    got = build(case, progress=lambda done, total: seen.append(done))
    assert got.path == path
    # The first report is of the rows that the killed build had finished.
    assert seen[0] == min(finished * 64, N)
    for name in ("phi.npy", "z.npy", "meta.parquet"):
        assert (got.path / name).read_bytes() == (want.path / name).read_bytes()


def test_two_builds_of_one_cache_at_once(case, tmp_path):
    children = [child(tmp_path, N + 1) for _ in range(2)]
    assert [c.wait(60) for c in children] == [0, 0]
    frozen, table, mapping, _ = case
    cache = build(case)
    np.testing.assert_array_equal(cache.z, looped(frozen, table, mapping)[1])


@pytest.mark.parametrize(
    "damage", ["z cut", "z gone", "phi of another shape", "meta cut", "y short"]
)
def test_a_damaged_cache_is_built_again(damage, case):
    cache = build(case)
    want = np.array(cache.z)
    z, meta = cache.path / "z.npy", cache.path / "meta.parquet"
    if damage == "z cut":
        z.write_bytes(z.read_bytes()[:-10])
    elif damage == "z gone":
        z.unlink()
    elif damage == "phi of another shape":
        np.save(cache.path / "phi.npy", np.zeros((N, C + 1), np.float32))
    elif damage == "meta cut":
        meta.write_bytes(meta.read_bytes()[:-10])
    else:
        pq.write_table(pq.read_table(meta).slice(1), meta)
    again = build(case)
    np.testing.assert_array_equal(again.z, want)
    np.testing.assert_array_equal(again.y, cache.y)


def test_the_default_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "hedged"
    for unset in ("", "relative/is/ignored"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_cache_dir() == Path.home() / ".cache" / "hedged"
