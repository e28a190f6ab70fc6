"""The cache of a model of maps: which pixels it draws, and its life after a real SIGKILL."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import posthoc.features
from posthoc.contract import DataError
from posthoc.data import infer_mapping, open_table, to_rows
from posthoc.features import Cache, build_cache
from posthoc.frozen import open_frozen
from posthoc.pixels import draw, pixels
from tests.posthoc.dense_nets import BODY, CONV, LAST_BODY, dense_model, images, looped, node

N, H, W, C = 25, 6, 7, 4
ROOT = Path(__file__).resolve().parents[2]
PLAIN = [*BODY, *CONV, node("Identity", ["z"], ["y"])]


def classes(n: int = N, seed: int = 5) -> np.ndarray:
    """Class maps with a margin that has no labels."""
    y = np.random.default_rng(seed).integers(0, C, (n, H, W))
    y[:, 0], y[:, :, 6] = -1, -1
    return y


class Case:
    def __init__(self, folder: Path, nodes: Any = None, task: Any = "classification", **how: Any):
        given = {"classes": C, "size": ("H", "W"), **how}
        model = dense_model(PLAIN if nodes is None else nodes, **given)
        (folder / "m.onnx").write_bytes(model)
        self.folder, self.task = folder, task
        self.frozen = open_frozen(folder / "m.onnx", task=task)

    def write(self, x: np.ndarray, y: np.ndarray | None, name: str = "t.npz") -> Path:
        columns = {"x": x} if y is None else {"x": x, "label": y}
        np.savez(self.folder / name, **columns)  # type: ignore[arg-type]
        return self.folder / name

    def build(self, path: Path, target: str | None = "label", **options: Any) -> Cache:
        table = open_table(path)
        mapping = infer_mapping(table.columns, self.frozen.inputs, target=target)
        given = {"task": self.task, "cache_dir": self.folder / "cache", "batch_size": 8,
                 "threads": 1, "pixels": 5}  # fmt: skip
        return build_cache(self.frozen, table, mapping, **{**given, **options})

    def hashes(self, path: Path) -> np.ndarray:
        table = open_table(path)
        mapping = infer_mapping(table.columns, self.frozen.inputs, target=None)
        rows = [to_rows(b, mapping, self.frozen.inputs) for b in table.batches(50, ["x"])]
        return np.concatenate([r.content_hashes for r in rows])


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize("last", [False, True])
def test_the_cache_holds_drawn_pixels_image_by_image(tmp_path: Path, last: bool) -> None:
    turned = [*LAST_BODY, *CONV, node("Transpose", ["z"], ["y"], perm=[0, 2, 3, 1])]
    case = Case(tmp_path, turned if last else PLAIN, last=last)
    x, y = images(N, H, W), classes()
    path = case.write(np.moveaxis(x, 1, -1) if last else x, y)
    cache = case.build(path)
    assert cache.n_rows == N * 5 and cache.per == 5 and cache.bad == {}
    assert cache.pixels is not None and cache.phi is not None and cache.y is not None
    phi, z = (v.reshape(N, H * W, -1) for v in looped(x, C))
    labels = y.reshape(N, -1)
    hashes = case.hashes(path)
    index = cache.pixels.reshape(N, 5)
    np.testing.assert_array_equal(index, draw(hashes, labels >= 0, 5))
    assert len({tuple(i) for i in index.tolist()}) > 20
    for image in range(N):
        for j in range(5):
            row, pixel = image * 5 + j, index[image, j]
            np.testing.assert_allclose(cache.phi[row], phi[image, pixel], atol=1e-5)
            np.testing.assert_allclose(cache.z[row], z[image, pixel], atol=1e-5)
            assert cache.y[row] == labels[image, pixel] >= 0
            assert cache.content_hashes[row] == cache.split_keys[row] == hashes[image]


def test_a_build_does_not_depend_on_its_batches(case: Case, monkeypatch: Any) -> None:
    path = case.write(images(N, H, W), classes())
    want = case.build(path)
    seen: list[int] = []
    # Two images of inputs, features and outputs: 2·(2 + 5 + 4)·42 numbers.
    monkeypatch.setattr(posthoc.filling, "_BATCH_BYTES", 2 * 11 * 42 * 4 + 8)
    got = case.build(path, batch_size=9, progress=lambda done, total: seen.append(done))
    assert seen == [0, *range(2, N, 2), N, N]
    np.testing.assert_array_equal(got.pixels, want.pixels)
    np.testing.assert_array_equal(got.y, want.y)
    np.testing.assert_allclose(got.z, want.z, atol=1e-5)
    monkeypatch.setattr(posthoc.filling, "_BATCH_BYTES", 8)
    seen.clear()
    one = case.build(path, batch_size=10, progress=lambda done, total: seen.append(done))
    assert seen == [*range(N + 1), N]
    np.testing.assert_array_equal(one.pixels, want.pixels)


def test_whatever_moves_the_numbers_makes_another_cache(case: Case, tmp_path: Path) -> None:
    path = case.write(images(N, H, W), classes())
    paths = [case.build(path, pixels=p).path for p in (5, 6)]
    paths.append(case.build(path, batch_size=4).path)
    (tmp_path / "other").mkdir()
    softmax = [*BODY, *CONV, node("Softmax", ["z"], ["y"], axis=1)]
    other = Case(tmp_path / "other", softmax)
    other.folder = case.folder
    paths.append(other.build(path).path)
    assert len(set(paths)) == 4 and case.build(path).path == paths[0]


def test_small_images_give_all_their_pixels_once(tmp_path: Path) -> None:
    case = Case(tmp_path, size=(H, W))
    y = classes()
    path = case.write(images(N, H, W), y)
    cache = case.build(path, pixels=1000)
    assert cache.per == H * W and cache.n_rows == N * H * W and cache.pixels is not None
    index = cache.pixels.reshape(N, -1)
    for row in index:
        counts = np.bincount(row, minlength=H * W).reshape(H, W)
        assert not counts[0].any() and not counts[:, 6].any()
        assert set(np.unique(counts[1:, :6])) == {1, 2}
    with pytest.raises(DataError, match="1 pixels of an image are too few"):
        case.build(path, pixels=1)


def test_bad_images_are_bad_as_a_whole(case: Case) -> None:
    x, y = images(N, H, W), classes()
    x[3, 0, 2, 2] = np.nan
    y[7], y[9, 3, 3] = -1, 255
    cache = case.build(case.write(x, y))
    why = {
        3: "column 'x': [16] is nan; only finite numbers can be used",
        7: "has no labelled pixel",
        9: "column 'label': holds 255, not a class index below 4 (or -1 for no label)",
    }
    assert cache.bad == {i * 5 + j: text for i, text in why.items() for j in range(5)}
    assert not cache.z[list(cache.bad)].any()
    good = np.setdiff1d(np.arange(N), list(why))
    np.testing.assert_array_equal(cache.usable, (good[:, None] * 5 + np.arange(5)).ravel())


def test_images_for_which_the_model_gives_nan_are_bad(tmp_path: Path) -> None:
    log = [BODY[0], node("Log", ["h"], ["phi"]), *CONV, node("Identity", ["z"], ["y"])]
    case = Case(tmp_path, log)
    x = images(N, H, W)
    phi = np.arctanh(looped(x, C)[0])  # what the convolution gives
    broken = [i for i in range(N) if (phi[i] < 0).any()]
    assert broken
    cache = case.build(case.write(x, classes()))
    assert set(cache.bad) == {i * 5 + j for i in broken for j in range(5)}
    assert all("NaN or Inf" in why for why in cache.bad.values())


VALUES = {
    "N×H×W": ([*BODY, *CONV, node("Squeeze", ["z", "one"], ["y"])], 1, (H, W)),
    "N×1×H×W": (PLAIN, 1, (1, H, W)),
    "N×3×H×W": (PLAIN, 3, (3, H, W)),
}


@pytest.mark.parametrize("name", VALUES)
def test_targets_with_holes(tmp_path: Path, name: str) -> None:
    nodes, k, shape = VALUES[name]
    case = Case(tmp_path, nodes, "regression", classes=k, extra={"one": np.array([1])})
    x, rng = images(N, H, W), np.random.default_rng(2)
    y = rng.normal(size=(N, *shape))
    y[rng.random(y.shape) < 0.3] = np.nan
    y[11] = np.nan
    cache = case.build(case.write(x, y))
    targets = pixels(y, None if len(shape) == 2 else 1)
    assert cache.y is not None and cache.pixels is not None and cache.y.shape == (N * 5, k)
    assert set(cache.bad) == set(range(55, 60))
    for row in cache.usable.tolist():
        want = targets[row // 5, cache.pixels[row]]
        assert np.isfinite(want).all()
        np.testing.assert_array_equal(cache.y[row], want)


@pytest.mark.parametrize(
    ("shape", "size", "why"),
    [
        ((W, H), ("H", "W"), "maps are 7×6 and the model's outputs 6×7"),
        ((3, 4), ("H", "W"), "maps are 3×4 and the model's outputs 6×7"),
        ((), ("H", "W"), "maps are 1×1 and the model's outputs 6×7"),
        ((W, H), (H, W), "column 'label': expected int64 of shape 6×7, found .* of shape 7×6"),
        ((), (H, W), "column 'label': expected int64 of shape 6×7, found int64"),
        ((2, C, H, W), (H, W), "expected int64 of shape 6×7, found .* of shape 2×4×6×7"),
    ],
)
def test_targets_of_another_size_name_both(
    tmp_path: Path, shape: tuple[int, ...], size: Any, why: str
) -> None:
    case = Case(tmp_path, size=size)
    path = case.write(images(N, H, W), np.zeros((N, *shape), np.int64))
    with pytest.raises(DataError, match=why):
        case.build(path)


def test_of_several_annotators_one_is_drawn_for_each_image(case: Case) -> None:
    x, y = images(N, H, W), classes()
    several = np.stack([y, (y + 1) % C, np.full_like(y, -1)], 1)  # the third labelled nothing
    cache = case.build(case.write(x, several))
    first, second = (case.build(case.write(x, several[:, a])).y for a in (0, 1))
    odd = cache.content_hashes % np.uint64(2) == 1
    assert 0 < odd.mean() < 1
    np.testing.assert_array_equal(cache.y, np.where(odd, second, first))
    one_hot = (np.arange(C)[:, None, None] == np.maximum(y, 0)[:, None]).astype(np.int64)
    with pytest.raises(DataError, match="looks one-hot"):
        case.build(case.write(x, one_hot))


def test_a_mask_may_have_an_axis_of_one(case: Case) -> None:
    x, y = images(N, H, W), classes()
    want, got = (case.build(case.write(x, v)) for v in (y, y[:, None]))
    np.testing.assert_array_equal(got.y, want.y)


def test_pixels_without_a_target_are_any(case: Case) -> None:
    cache = case.build(case.write(images(N, H, W), None), target=None)
    assert cache.y is None and cache.pixels is not None and cache.bad == {}
    assert (np.bincount(cache.pixels, minlength=H * W) > 0).sum() > 35


def test_a_batch_of_faulty_images_fails_alone(case: Case) -> None:
    """Sizes are free, so that nothing says what size a missing image would have had."""
    x, y = images(6, H, W), classes(6)
    shaped = [pa.list_(pa.list_(pa.list_(pa.float32()))), pa.list_(pa.list_(pa.int64()))]
    missing = [None if i in (0, 1, 4) else v.tolist() for i, v in enumerate(x)]
    unlabelled = [None if i == 5 else v.tolist() for i, v in enumerate(y)]
    path = case.folder / "t.parquet"
    columns = {"x": pa.array(missing, shaped[0]), "label": pa.array(unlabelled, shaped[1])}
    pq.write_table(pa.table(columns), path)
    for batch_size in (1, 2, 6):
        cache = case.build(path, batch_size=batch_size)
        why = {0: "column 'x': is null", 1: "column 'x': is null", 4: "column 'x': is null"}
        why[5] = "column 'label': is null"
        assert cache.bad == {i * 5 + j: text for i, text in why.items() for j in range(5)}
        assert cache.pixels is not None
        z = looped(x, C)[1].reshape(6, -1, C)
        for row in cache.usable.tolist():
            np.testing.assert_allclose(cache.z[row], z[row // 5, cache.pixels[row]], atol=1e-5)


CHILD = """
import os, signal, sys
import posthoc.features
from posthoc.data import infer_mapping, open_table
from posthoc.frozen import open_frozen

posthoc.features._SHARD_ROWS = 40
frozen = open_frozen("m.onnx", task="classification")
table = open_table("t.npz")
mapping = infer_mapping(table.columns, frozen.inputs, target="label")

def progress(done, total):
    if done >= int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

posthoc.features.build_cache(frozen, table, mapping, task="classification", cache_dir="cache",
                             batch_size=4, threads=1, pixels=5, progress=progress)
"""


@pytest.mark.parametrize("kill_at", [4, 8, 20, N])
def test_a_killed_build_goes_on_from_its_finished_images(
    kill_at: int, case: Case, monkeypatch: Any
) -> None:
    monkeypatch.setattr(posthoc.features, "_SHARD_ROWS", 40)  # two batches of four images
    path = case.write(images(N, H, W), classes())
    want = case.build(path, batch_size=4, cache_dir=case.folder / "uninterrupted")
    command = [sys.executable, "-c", CHILD, str(kill_at)]
    child = subprocess.Popen(command, cwd=case.folder, env={"PYTHONPATH": str(ROOT)})
    assert child.wait(60) == -signal.SIGKILL
    [folder] = (case.folder / "cache").iterdir()
    finished = kill_at // 8 if kill_at < N else 4
    assert len(list(folder.glob("rows-*.parquet"))) == finished
    seen: list[int] = []
    got = case.build(path, batch_size=4, progress=lambda done, total: seen.append(done))
    assert got.path == folder and seen[0] == min(finished * 8, N)
    for name in ("phi.npy", "z.npy", "meta.parquet"):
        assert (got.path / name).read_bytes() == (want.path / name).read_bytes()
