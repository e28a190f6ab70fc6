"""A cache filled by workers against one filled here, and sums over shares against one sum."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posthoc.features
from posthoc import registry
from posthoc import rows as blocks_of
from posthoc.contract import DataError, Features, State
from posthoc.data import infer_mapping, open_table
from posthoc.features import Cache, build_cache
from posthoc.filling import Filler, Pass, spans
from posthoc.frozen import open_frozen
from posthoc.shards import allocate
from tests.conformance.cases import CASES, Case
from tests.posthoc.dense_nets import images
from tests.posthoc.posted import Posted
from tests.posthoc.test_features import N, build, network, write_rows
from tests.posthoc.test_features_dense import Case as Maps
from tests.posthoc.test_features_dense import classes

FILES = ("meta.parquet", "phi.npy", "z.npy")


@pytest.fixture
def case(tmp_path: Path) -> Any:
    frozen = open_frozen(network(tmp_path / "m.onnx"), task="classification")
    table = open_table(write_rows(tmp_path / "t.parquet"))
    return frozen, table, infer_mapping(table.columns, frozen.inputs, target="y"), tmp_path / "a"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two batches, shares of a few hundred rows."""
    monkeypatch.setattr(posthoc.features, "_SHARD_ROWS", 64)
    monkeypatch.setattr(blocks_of, "SHARE", 256)


def same(a: Cache, b: Cache) -> None:
    for name in FILES:
        assert (a.path / name).read_bytes() == (b.path / name).read_bytes(), name
    assert sorted(p.name for p in a.path.iterdir()) == sorted(p.name for p in b.path.iterdir())


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_workers_make_the_same_bytes(case: Any, tmp_path: Path, workers: int) -> None:
    mapper, seen = Posted(workers), []
    made = build(
        case, cache_dir=tmp_path / "b", mapper=mapper, progress=lambda *told: seen.append(told)
    )
    same(made, build(case))
    assert mapper.items == 4  # shards: few are given out singly
    assert [done for done, _ in seen] == [0, 64, 128, 192, N, N]


def test_workers_make_the_same_bytes_of_maps(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    maps = Maps(tmp_path / "maps")
    path = maps.write(images(25, 6, 7), classes())
    want = maps.build(path)
    mapper = Posted()
    same(maps.build(path, cache_dir=tmp_path / "b", mapper=mapper), want)
    assert mapper.items > 1


def test_only_what_is_missing_is_filled(case: Any, tmp_path: Path) -> None:
    """A build whose workers were killed has gaps: shards 2 and 3 of 4 are there."""
    want = build(case)
    half = tmp_path / "b"

    class Killed(Posted):
        def __call__(self, function: Any, items: Any, /) -> Any:
            for i, result in enumerate(super().__call__(function, sorted(items, key=_last_first))):
                if i == 2:
                    raise KeyboardInterrupt
                yield result

    with pytest.raises(KeyboardInterrupt):
        build(case, cache_dir=half, mapper=Killed())
    (path,) = half.iterdir()
    (path / "rows-000001.parquet").unlink()  # of 3, 2 and 1, which came first
    mapper, seen = Posted(), []
    made = build(case, cache_dir=half, mapper=mapper, progress=lambda done, _: seen.append(done))
    same(made, want)
    assert mapper.items == 2 and seen[0] == N - 128


def _last_first(span: range) -> int:
    return -span.start


def test_a_gap_is_filled_here_too(case: Any, tmp_path: Path) -> None:
    want, mapper = build(case), Posted()
    frozen, table, mapping, _ = case
    folder = tmp_path / "b"

    def stopped(done: int, total: int) -> None:
        if done > 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(
            frozen, table, mapping, task="classification", cache_dir=folder, batch_size=32,
            threads=1, mapper=mapper, progress=stopped,
        )  # fmt: skip
    (path,) = folder.iterdir()
    (path / "rows-000000.parquet").unlink()
    seen: list[int] = []
    same(build(case, cache_dir=folder, progress=lambda done, _: seen.append(done)), want)
    assert seen[0] == 64


def test_spans_are_neighbours_and_lose_none() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        shards = np.flatnonzero(rng.random(30) < 0.7).tolist()
        most = int(rng.integers(1, 12))
        found = spans(shards, most)
        assert [s for span in found for s in span] == shards
        assert all(len(span) <= most for span in found)
        for a, b in pairwise(found):  # none could have taken the next shard
            assert b.start > a.stop or len(a) == most


def test_a_worker_that_was_lost_has_left_its_finished_shards(case: Any, tmp_path: Path) -> None:
    """What is tried again begins after them: their numbers are not written again."""
    frozen, table, mapping, _ = case
    want = build(case)
    path = tmp_path / "b"
    path.mkdir()
    given = Pass(path, frozen, table, mapping, "classification", None, 32, 64, 1, "cpu", 1)
    allocate(path, {"phi": 5, "z": 4}, N)
    assert Filler(given)(range(2)) == 128
    z = np.load(path / "z.npy", mmap_mode="r+")
    np.testing.assert_array_equal(z[:128], want.z[:128])
    z[:128] = 7
    z.flush()
    assert Filler(given)(range(3)) == 192
    again = np.load(path / "z.npy")
    assert (again[:128] == 7).all() and np.array_equal(again[128:192], want.z[128:192])


def test_a_worker_that_sees_no_folder_or_no_table_says_so(case: Any, tmp_path: Path) -> None:
    frozen, table, mapping, _ = case
    given = Pass(
        tmp_path / "nowhere", frozen, table, mapping, "classification", None, 32, 64, 1, "cpu", 1
    )
    with pytest.raises(DataError, match=r"the worker on .* does not see .*nowhere.*--cache a fol"):
        Filler(given)(range(1))
    share = build(case).shared(np.arange(10), "identity").shares[0]
    there = build(case)
    (there.path / "z.npy").rename(tmp_path / "z.npy")
    with pytest.raises(DataError, match=r"does not see .*--cache a folder"):
        list(share())
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "z.npy").rename(tmp_path / "nowhere" / "z.npy")
    Path(table.path).unlink()
    with pytest.raises(DataError, match=r"does not see .*t\.parquet: put the rows where"):
        Filler(given)(range(1))


def test_records_that_never_come_are_missed(case: Any) -> None:
    class Elsewhere(Posted):
        """Workers whose folder of that name is another one."""

        def __call__(self, function: Any, items: Any, /) -> Any:
            return iter([64, 64, 64, 58])

    with pytest.raises(DataError, match=r"rows-000000\.parquet was written by a worker and is not"):
        build(case, mapper=Elsewhere())


# Sums over shares


def test_shares_hold_the_rows_in_their_order_and_little_travels(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = build(case)
    rows = np.random.default_rng(0).permutation(N)[:230]
    monkeypatch.setattr(blocks_of, "BLOCK", 64)
    shared = cache.shared(rows, "log")
    want = cache.take(rows)
    for got in (blocks_of.join(list(shared)), blocks_of.join(list(shared))):
        np.testing.assert_array_equal(got.phi, want.phi)
        np.testing.assert_array_equal(got.z, np.log(np.maximum(want.z, 1e-30)))
        np.testing.assert_array_equal(got.y, want.y)
    assert shared.n == 230 and len(shared.shares) == 1
    assert len(pickle.dumps(shared.shares[0])) < 230 * (8 + 8) + 1500  # numbers and labels
    blank = Features(None, want.z)
    assert [len(b) for b in blocks_of.of(blank, 64)] == [64, 64, 64, 38]
    assert [len(list(s())) for s in blocks_of.of(blank, 64).shares] == [4]


@pytest.mark.parametrize("case_", [c for c in CASES if c.folds], ids=str)
def test_every_fold_is_the_same_shared_out(case_: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bits here and by workers, and one sum over all rows within rounding."""
    rows = case_.rows(seed=0, n=700)
    mapper = Posted()

    def fitted(by: Posted | None) -> State:
        own = blocks_of.of(rows, 64)
        if case_.module:
            return registry.fit(case_.name, case_.head(), case_.task, own, {}, None, by)
        return registry.fit_score(case_.name, case_.head(), own, by)

    here, there = fitted(None), fitted(mapper)
    assert mapper.items >= 3
    assert here.settings == there.settings
    for name, tensor in here.tensors.items():
        np.testing.assert_array_equal(there.tensors[name], tensor)
    monkeypatch.setattr(blocks_of, "SHARE", 1 << 20)
    whole = fitted(None)
    want, got = case_.apply(whole, rows), case_.apply(here, rows)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
