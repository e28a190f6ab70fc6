"""`score_batches` against the files of `score`, and the recipe of its docstring."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hedged
from posthoc.contract import BundleError, DataError, Task
from service.scoring import batches as page
from service.scoring import score
from service.scoring.batches import ERROR, batches_schema, score_batches
from tests.factory import tiny_bundle, version_of
from tests.service.scoring.conftest import table

BATCH = 64


def cut(rows: pa.Table, size: int) -> list[pa.RecordBatch]:
    return rows.combine_chunks().to_batches(max_chunksize=size)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.3}])
def test_rows_are_those_of_score(
    bundle: Path, regressor: Path, tmp_path: Path, task: Task, options: dict[str, Any]
) -> None:
    which = bundle if task == "classification" else regressor
    rows = table(300, 3, task, bad=(0, 70, 299))
    pq.write_table(rows, tmp_path / "in.parquet")
    shared: dict[str, Any] = {"batch_size": BATCH, "passthrough": ["day"], **options}
    score(which, tmp_path / "in.parquet", tmp_path / "out", max_error_ratio=0.5, **shared)
    # Of batches that fragments are cut into as well, every bit is the same.
    got = pa.Table.from_batches(score_batches(which, cut(rows, 2 * BATCH), **shared))
    want = pq.read_table(tmp_path / "out" / "in.parquet").to_pylist()
    assert got.num_rows == 300  # row for row
    assert got["id"].to_pylist() == rows["id"].to_pylist()
    assert got["day"].to_pylist() == rows["day"].to_pylist()
    errors = {r: e for r, e in enumerate(got[ERROR].to_pylist()) if e is not None}
    file = pq.read_table(tmp_path / "out" / "_errors" / "in.parquet")
    assert errors == dict(zip(file["row"].to_pylist(), file["reason"].to_pylist(), strict=True))
    good = [row for row in got.to_pylist() if row.pop(ERROR) is None]
    assert good == [{k: v for k, v in row.items() if k != "row"} for row in want]
    fields = [n for n in got.column_names if n not in ("id", "day", ERROR)]
    assert all(got[n][r].as_py() is None for n in fields for r in errors)


def test_the_schema_is_known_beforehand_and_holds_for_every_batch(
    bundle: Path, tmp_path: Path
) -> None:
    rows = table(100, 1, bad=tuple(range(40, 80)))
    schema = batches_schema(bundle, rows.schema, passthrough=["day"], outputs=["label", "probs"])
    assert schema.names == ["id", "day", "label", "probs", ERROR]
    assert schema.field("probs").type == pa.list_(pa.float32())
    shared = {"passthrough": ["day"], "outputs": ["label", "probs"]}
    found = list(score_batches(bundle, cut(rows, 20), batch_size=8, **shared))
    assert [b.num_rows for b in found] == [20] * 5
    assert all(b.schema.equals(schema, check_metadata=True) for b in found)
    assert found[2][ERROR].null_count == 0 and found[2]["probs"].null_count == 20
    nothing = pa.RecordBatch.from_pylist([], schema=rows.schema)
    (empty,) = score_batches(bundle, [nothing], **shared)
    assert empty.num_rows == 0 and empty.schema.equals(schema)
    for batch in found:
        batch.validate(full=True)


def test_names_that_clash_are_refused(bundle: Path) -> None:
    rows = table(10, 1).append_column(ERROR, pa.array(["x"] * 10))
    with pytest.raises(DataError, match=ERROR):
        batches_schema(bundle, rows.schema, passthrough=[ERROR])
    taken = table(10, 1).append_column("label", pa.array(range(10)))
    schema = batches_schema(bundle, taken.schema, passthrough=["label"])
    assert schema.field("label").type == pa.int64()
    assert schema.field("uq_label").type == pa.string()


def test_batches_are_taken_one_at_a_time(bundle: Path) -> None:
    taken = []

    def source() -> Iterator[pa.RecordBatch]:
        for i, batch in enumerate(cut(table(60, 2), 20)):
            taken.append(i)
            yield batch

    stream = score_batches(bundle, source())
    assert taken == []
    next(stream)
    assert taken == [0]
    assert len(list(stream)) == 2


def test_a_bundle_is_opened_once_until_another_lies_there(tmp_path: Path) -> None:
    page._predictor.cache_clear()
    path = tiny_bundle(tmp_path / "bundle")
    one = list(score_batches(path, cut(table(30, 2), 30)))
    list(score_batches(path, cut(table(30, 2), 30)))
    assert (page._predictor.cache_info().misses, page._predictor.cache_info().hits) == (1, 1)
    other = version_of(path, tmp_path / "root", "tiny", "2")
    path.rename(tmp_path / "old")
    other.rename(path)
    again = list(score_batches(path, cut(table(30, 2), 30)))
    assert page._predictor.cache_info().misses == 2
    assert again[0].equals(one[0])  # the same model under another version
    (path / "manifest.json").unlink()
    with pytest.raises(BundleError, match="not a bundle"):
        list(score_batches(path, cut(table(30, 2), 30)))


def test_what_cannot_be_meant(bundle: Path, maps_root: Path) -> None:
    rows = cut(table(10, 1), 10)
    for options, message in (
        ({"batch_size": 0}, "at least 1"),
        ({"outputs": ["colour"]}, "gives no 'colour'"),
        ({"passthrough": ["colour"]}, "colour"),
        ({"alpha": 1.0}, "strictly between 0 and 1"),
    ):
        with pytest.raises(DataError, match=message):
            list(score_batches(bundle, rows, **options))
    with pytest.raises(DataError, match="hedged score"):
        list(score_batches(maps_root / "segmenter/1", rows))


def recipe(bundle: Path) -> dict[str, Any]:
    """What the docstring's lines make, with our bundle at its path; Spark's own call left out."""
    text = inspect.getdoc(score_batches) or ""
    code = dedent(text.split("``mapInArrow``::")[1].split("``example`` is")[0])
    assert "df.mapInArrow(predict, from_arrow_schema(schema))" in code
    lines = [line for line in code.splitlines() if "mapInArrow" not in line]
    made: dict[str, Any] = {"example": table(1, 0).schema}
    source = "\n".join(lines).replace("/bundles/churn", str(bundle)).replace("customer", "day")
    exec(source, made)
    return made


def test_the_recipe_for_spark(bundle: Path) -> None:
    made = recipe(bundle)
    rows = table(50, 4, bad=(7,))
    # What mapInArrow does in a task: an iterator of batches goes in, one of the schema comes out.
    found = list(made["predict"](iter(cut(rows, 16))))
    assert all(batch.schema.equals(made["schema"]) for batch in found)
    got = pa.Table.from_batches(found)
    assert got["day"].to_pylist() == rows["day"].to_pylist()
    assert [r for r, e in enumerate(got[ERROR].to_pylist()) if e] == [7]
    assert np.isfinite(got["confidence"].drop_null().to_numpy()).all()


def test_an_executor_needs_no_torch(bundle: Path, tmp_path: Path) -> None:
    pq.write_table(table(20, 1), tmp_path / "in.parquet")
    code = f"""
import json, sys
import pyarrow.parquet as pq, hedged
rows = pq.read_table({str(tmp_path / "in.parquet")!r}).to_batches()
n = sum(b.num_rows for b in hedged.score_batches({str(bundle)!r}, rows))
print(json.dumps([n, sorted({{"torch", "onnx", "sklearn", "plotly", "scipy"}} & set(sys.modules))]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(hedged.__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(done.stdout) == [20, []]
