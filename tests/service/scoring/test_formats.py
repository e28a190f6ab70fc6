"""The same rows in every format get the same answers, and what each format adds of its own."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from posthoc.contract import DataError
from service.scoring import score
from service.scoring.formats import arrays, lines
from tests.factory import COLUMNS
from tests.service.scoring.conftest import outputs, table, tree
from tests.service.scoring.files import FLOAT, look, rows_of

NAMES = COLUMNS["classification"]
BAD = (2, 65)


def numbers(rows: pa.Table) -> np.ndarray:
    return np.stack([rows[c].to_numpy() for c in NAMES], axis=1)


def to_csv(rows: pa.Table, path: Path) -> None:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["day", *rows.schema.names[:-1]])
    for row in rows.to_pylist():
        row = {
            k: "abc" if v != v else repr(v) if isinstance(v, float) else v for k, v in row.items()
        }
        writer.writerow([row.pop("day"), *row.values()])
    data = out.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def to_ndjson(rows: pa.Table, path: Path) -> None:
    lines = (json.dumps({k: None if v != v else v for k, v in r.items()}) for r in rows.to_pylist())
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def to_stream(rows: pa.Table, path: Path) -> None:
    with ipc.new_stream(path, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=50)


def to_npz(rows: pa.Table, path: Path) -> None:
    ids = np.array(rows["id"].to_pylist())
    np.savez(path, id=ids, **{c: rows[c].to_numpy() for c in NAMES})


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "r.csv": to_csv,
    "r.csv.gz": to_csv,
    "r.ndjson": to_ndjson,
    "r.jsonl.gz": to_ndjson,
    "r.feather": lambda rows, path: feather.write_feather(rows, str(path), chunksize=60),
    "r.arrow": lambda rows, path: feather.write_feather(rows, str(path), compression="zstd"),
    "r.arrows": to_stream,
    "r.ipc": to_stream,
    "r.npz": to_npz,
    "r.npy": lambda rows, path: np.save(path, numbers(rows)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_any_format_gives_the_answers_of_parquet(
    name: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 512)
    monkeypatch.setattr(lines, "GROUP_ROWS", 20)
    monkeypatch.setattr(arrays, "GROUP_ROWS", 20)
    rows = table(150, 0, bad=BAD)
    pq.write_table(rows, tmp_path / "r.parquet")
    WRITERS[name](rows, tmp_path / name)
    score(bundle, tmp_path / "r.parquet", tmp_path / "want")
    summary = score(bundle, tmp_path / name, tmp_path / "got", passthrough=["day"] * (name < "r.n"))
    assert (summary.good, summary.errors, summary.fragments) == (148, 2, 1)
    want, got = (pq.read_table(tmp_path / f / "r.parquet") for f in ("want", "got"))
    assert want["row"].to_pylist() == got["row"].to_pylist()
    if name == "r.npy":
        want = want.drop_columns("id")
    if name < "r.n":
        day = [str(v) if "csv" in name or "json" in name else v for v in rows["day"].to_pylist()]
        assert got["day"].to_pylist() == [v for k, v in enumerate(day) if k not in BAD]
        got = got.drop_columns("day")
    assert got.to_pydict() == want.to_pydict()
    errors = pq.read_table(tmp_path / "got" / "_errors" / "r.parquet").to_pylist()
    assert [e["row"] for e in errors] == list(BAD)
    column = "array" if name == "r.npy" else "a"
    assert all(e["source"] == name and f"column {column!r}" in e["reason"] for e in errors)
    # A fragment in the middle of a file is found again.
    parts = score(bundle, tmp_path / name, tmp_path / "cut", fragment_rows=60, batch_size=20)
    many = not name.endswith((".gz", ".arrows", ".ipc", ".npz", ".arrow"))
    assert (parts.fragments > 1) == many
    cut = pa.concat_tables(pq.read_table(tmp_path / "cut" / f) for f in outputs(tmp_path / "cut"))
    assert cut["row"].to_pylist() == want["row"].to_pylist()
    if "id" in cut.schema.names:
        assert cut["id"].to_pylist() == want["id"].to_pylist()
    np.testing.assert_allclose(cut["confidence"], want["confidence"], rtol=1e-6)


def test_an_npz_may_name_the_inputs_of_the_model(bundle: Path, tmp_path: Path) -> None:
    rows = table(40, 1)
    np.savez_compressed(tmp_path / "r.npz", x=numbers(rows), day=np.arange(40))
    pq.write_table(rows, tmp_path / "r.parquet")
    score(bundle, tmp_path / "r.npz", tmp_path / "got", passthrough=["day"])
    score(bundle, tmp_path / "r.parquet", tmp_path / "want")
    got, want = (pq.read_table(tmp_path / f / "r.parquet") for f in ("got", "want"))
    assert got["day"].to_pylist() == list(range(40))
    assert got["probs"].to_pylist() == want["probs"].to_pylist()
    np.savez(tmp_path / "other.npz", z=numbers(rows))
    with pytest.raises(DataError, match="column 'a' is needed; it has z"):
        score(bundle, tmp_path / "other.npz", tmp_path / "out")


def test_a_fortran_array_and_one_of_another_width(bundle: Path, tmp_path: Path) -> None:
    x = numbers(table(40, 1))
    np.save(tmp_path / "c.npy", x)
    np.save(tmp_path / "f.npy", np.asfortranarray(x))
    want, got = (score(bundle, tmp_path / f"{o}.npy", tmp_path / o) for o in "cf")
    assert want.good == got.good == 40
    assert pq.read_table(tmp_path / "c/c.parquet").equals(pq.read_table(tmp_path / "f/f.parquet"))
    np.save(tmp_path / "wide.npy", np.zeros((5, 7)))
    with pytest.raises(DataError, match=r"'array': expected float32 of shape 4, found .* 7"):
        score(bundle, tmp_path / "wide.npy", tmp_path / "out")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.arrow", "a.feather", "a.csv.gz"])
def test_damaged_files_are_reported(name: str, bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    rows = table(40, 1)
    good = source / name.replace("a.", "z.")
    if name == "a.npy":
        np.save(good, numbers(rows))
    else:
        WRITERS[name.replace("a.", "r.")](rows, good)
    (source / name).write_bytes(good.read_bytes()[:-90])
    (source / name.replace("a.", "b.")).write_bytes(b"nothing of that kind")
    (source / name.replace("a.", "c.")).write_bytes(b"")
    summary = score(bundle, source, tmp_path / "out")
    assert [f.source[:1] for f in summary.failed] == ["a", "b", "c"]
    assert summary.good == 40 and outputs(tmp_path / "out") == ["z.parquet"]


def test_arrays_that_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    for arrays_of, message in (
        ({"a": np.zeros(3), "b": np.zeros(4)}, "must have one length"),
        ({"a": np.array(1.0)}, "no values in a row"),
        ({"a": np.zeros(3, complex)}, "not numbers or text"),
        ({"a": np.array([{}, {}], object)}, "not numbers or text"),
    ):
        np.savez(path, **arrays_of)
        with pytest.raises(OSError, match=message):
            look(path)


def test_duplicate_names_matter_only_where_they_are_used(bundle: Path, tmp_path: Path) -> None:
    head, body = "a,b,c,d,day,day\n", "1,2,3,4,5,6\n" * 3
    (tmp_path / "r.csv").write_text(head + body)
    assert score(bundle, tmp_path / "r.csv", tmp_path / "out").good == 3
    with pytest.raises(DataError, match="column 'day' is needed; it has 2 of them"):
        score(bundle, tmp_path / "r.csv", tmp_path / "o2", passthrough=["day"])
    (tmp_path / "r.csv").write_text("a,b,c,d,d\n" + "1,2,3,4,5\n")
    with pytest.raises(DataError, match="column 'd' is needed; it has 2 of them"):
        score(bundle, tmp_path / "r.csv", tmp_path / "o3")


def test_a_column_may_be_in_the_path(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for k, day in enumerate(("0.5", "-1", "__HIVE_DEFAULT_PARTITION__")):
        folder = source / f"d={day}" / "who=me%2Fyou"
        folder.mkdir(parents=True)
        rows = table(30, k).drop_columns("d")
        pq.write_table(rows, folder / "r.parquet")
    summary = score(bundle, source, tmp_path / "out", max_error_ratio=0.5)
    assert (summary.good, summary.errors) == (60, 30)
    for k, day in ((0, "0.5"), (1, "-1")):
        rows = table(30, k)
        filled = rows.set_column(3, "d", pa.array(np.full(30, float(day))))
        pq.write_table(filled, tmp_path / "whole.parquet")
        score(bundle, tmp_path / "whole.parquet", tmp_path / f"whole-{k}")
        got = pq.read_table(tmp_path / f"out/d={day}/who=me%2Fyou/r.parquet", partitioning=None)
        assert got.equals(pq.read_table(tmp_path / f"whole-{k}/whole.parquet"))
    (errors,) = (n for n in tree(tmp_path / "out") if n.startswith("_errors/"))
    reasons = pq.read_table(tmp_path / "out" / errors, partitioning=None)["reason"].to_pylist()
    assert set(reasons) == {"column 'd': is null"}
    # One folder of a tree given by itself: the key is above the input, and used all the same.
    alone = score(bundle, source / "d=-1", tmp_path / "alone")
    assert alone.good == 30
    with pytest.raises(DataError, match="'who' is no column of the file but part of its path"):
        score(bundle, source, tmp_path / "o2", passthrough=["who"])
    with pytest.raises(DataError, match="column 'a' is needed"):
        pq.write_table(table(3, 0).drop_columns(["a", "d"]), source / "d=-1" / "s.parquet")
        score(bundle, source / "d=-1", tmp_path / "o3")


def test_files_without_rows_and_rows_that_are_all_bad(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.csv").write_text("a,b,c,d\n")
    (source / "b.csv").write_text("a,b,c,d\n" + "1,2,x,4\n1,2\n" * 3)
    (source / "c.csv").write_text("a,b,c,d\n1,2,3,4\n")
    summary = score(bundle, source, tmp_path / "out", max_error_ratio=1)
    assert (summary.rows, summary.good, summary.errors, summary.fragments) == (7, 1, 6, 3)
    got = {n: pq.read_table(tmp_path / "out" / n).num_rows for n in outputs(tmp_path / "out")}
    assert got == {"a.parquet": 0, "b.parquet": 0, "c.parquet": 1}
    reasons = pq.read_table(tmp_path / "out/_errors/b.parquet")["reason"].to_pylist()
    assert (
        reasons
        == [
            "column 'c': is 'x', which is no number",
            "has 2 fields, and the first line 4",
        ]
        * 3
    )


def test_several_formats_at_once_are_refused(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(table(10, 0), source / "r.parquet")
    to_csv(table(10, 0), source / "r.csv")
    with pytest.raises(DataError, match=r"has CSV and Parquet files; .* such as '.*\*\*/\*\.csv'"):
        score(bundle, source, tmp_path / "out")
    assert score(bundle, f"{source}/**/*.csv", tmp_path / "out").good == 10


def test_ipc_batches_are_groups(tmp_path: Path) -> None:
    rows = pa.table({"t": ["a", "b", "c", "d", "e"], "x": pa.array([1.0, 2, 3, 4, 5])})
    feather.write_feather(rows, str(tmp_path / "r.feather"), chunksize=2)
    assert look(tmp_path / "r.feather").groups == (2, 2, 1)
    got, _ = rows_of(tmp_path / "r.feather", ["x", "t"], {"x": FLOAT}, cut=True, at_once=9)
    assert got == [{"x": float(k), "t": "abcde"[k - 1]} for k in range(1, 6)]
