from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc.contract import DataError
from service.scoring import ScoringError
from service.scoring.fragments import Columns, Listing, _cut, list_fragments
from service.scoring.places import open_place
from service.scoring.sources import Source


def put(path: Path, n: int = 3, **columns: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"a": list(range(n)), **columns}), path)
    return path


def listing(path: Path, kept: tuple[str, ...] = (), rows: int = 100) -> Listing:
    return list_fragments(open_place(path), lambda form, schema: Columns(("a",), kept), rows)


@given(groups=st.lists(st.integers(0, 50), max_size=30), limit=st.integers(1, 80))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_fragments_partition_a_file_by_row_groups(groups: list[int], limit: int) -> None:
    parts = _cut(Source(open_place("f"), "x/f.parquet", 1, 1, "Parquet", tuple(groups)), limit)
    assert [g for p in parts for g in p.groups] == list(range(len(groups)))
    at = 0
    for part in parts:
        assert part.first_row == at
        assert part.rows == sum(groups[g] for g in part.groups)
        assert part.rows <= limit or len(part.groups) == 1
        at += part.rows
    assert at == sum(groups)
    names = [p.name for p in parts]
    assert names == sorted(set(names))
    assert len(parts) > 1 or names == ["x/f.parquet"]
    # No fragment could have taken the next one's first row group.
    for part, after in pairwise(parts):
        assert part.rows + groups[after.groups[0]] > limit


def test_a_folder_is_listed_by_name_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.parquet", "k=2/a.parquet", "k=10/z.pq", "_x/h.parquet", ".y/h.parquet"):
        put(tmp_path / name)
    put(tmp_path / "_hidden.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    found = listing(tmp_path)
    assert [s.name for s in found.sources] == ["b.parquet", "k=10/z.pq", "k=2/a.parquet"]
    assert [f.name for f in found.fragments] == ["b.parquet", "k=10/z.parquet", "k=2/a.parquet"]
    assert found.rows == 9


def test_one_file_is_an_input_too(tmp_path: Path) -> None:
    (fragment,) = listing(put(tmp_path / "_any name.parquet")).fragments
    assert (fragment.name, fragment.rows) == ("_any name.parquet", 3)


def test_unreadable_files_are_kept_apart(tmp_path: Path) -> None:
    whole = put(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(whole.read_bytes()[:-7])
    (tmp_path / "c.parquet").touch()
    found = listing(tmp_path)
    assert [s.name for s in found.unreadable] == ["b.parquet", "c.parquet"]
    assert all(s.problem and s.rows is None for s in found.unreadable)
    assert [f.name for f in found.fragments] == ["a.parquet"]


def test_columns_must_be_there_in_every_file(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", day=pa.array([1, 2, 3]))
    bad = put(tmp_path / "b.parquet", day=pa.array(["x", "y", "z"]))
    assert listing(tmp_path).rows == 6  # only what is passed through must have one type
    with pytest.raises(DataError, match=r"b\.parquet: column 'day' is string, and int64 in"):
        listing(tmp_path, kept=("day",))
    pq.write_table(pa.table({"day": [1]}), bad)
    with pytest.raises(DataError, match=r"b\.parquet: column 'a' is needed; it has day"):
        listing(tmp_path)
    pq.write_table(pa.Table.from_arrays([pa.array([1])] * 2, names=["a", "a"]), bad)
    with pytest.raises(DataError, match="column 'a' is needed; it has 2 of them"):
        listing(tmp_path)


def test_inputs_that_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        listing(tmp_path / "gone")
    with pytest.raises(DataError, match=r"none of its files ends in \.parquet"):
        listing(tmp_path)
    (tmp_path / "c.parquet").touch()
    with pytest.raises(DataError, match=r"no file can be read; c\.parquet: .*0 bytes"):
        listing(tmp_path)


def test_two_inputs_never_share_an_output(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet")
    put(tmp_path / "a.pq")
    with pytest.raises(DataError, match=r"a\.parquet and a\.pq would both .* rename one"):
        listing(tmp_path)


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    path = put(tmp_path / "a.parquet")
    (source,) = listing(path).sources
    source.check_unchanged()
    os.utime(path, ns=(0, source.mtime_ns + 1))
    with pytest.raises(ScoringError, match="changed during the run"):
        source.check_unchanged()
    path.unlink()
    with pytest.raises(ScoringError, match="vanished"):
        source.check_unchanged()
