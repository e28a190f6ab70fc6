"""A file that could not be read is mended, or taken away, and the same command goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.scoring import ScoringError, score
from tests.service.scoring.conftest import table, tree

BATCH = 64


def test_a_file_that_could_not_be_read_is_mended_and_the_run_goes_on(
    bundle: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "input", tmp_path / "out"
    source.mkdir()
    for seed, name in enumerate("abc"):
        pq.write_table(table(50, seed), source / f"{name}.parquet")
    whole = (source / "c.parquet").read_bytes()
    (source / "c.parquet").write_bytes(whole[:100])
    asked: dict[str, Any] = {"batch_size": BATCH, "fragment_rows": 50}
    first = score(bundle, source, out, **asked)
    assert [f.source for f in first.failed] == ["c.parquet"] and first.good == 100
    assert not (out / "_SUCCESS").exists()
    before = tree(out)

    # Mended with many rows, of which one is bad; then with the right ones.
    bad = table(120, 8).set_column(0, "a", pa.array([None, *[0.5] * 119], pa.float32()))
    pq.write_table(bad, source / "c.parquet", row_group_size=50)
    other = score(bundle, source, out, **asked)
    assert (other.good, other.errors, other.resumed, other.failed) == (219, 1, 2, ())
    assert len([n for n in tree(out) if n.startswith("c-")]) == 3
    (source / "c.parquet").write_bytes(whole)
    done = score(bundle, source, out, **asked)
    assert (done.good, done.errors, done.resumed, done.failed) == (150, 0, 2, ())
    after = tree(out)
    assert {"a.parquet", "b.parquet", "c.parquet", "_SUCCESS"} <= set(after)
    assert not [n for n in after if n.startswith(("c-", "_errors"))]
    assert all(after[n] == before[n] for n in ("a.parquet", "b.parquet", "_run.json"))
    fresh = tmp_path / "fresh"
    score(bundle, source, fresh, **asked)
    assert pq.read_table(out / "c.parquet").equals(pq.read_table(fresh / "c.parquet"))

    # What could be read stays as it was; what could not may be taken away.
    (source / "c.parquet").unlink()
    assert score(bundle, source, out, **asked).good == 100
    assert not (out / "c.parquet").exists()
    (source / "b.parquet").unlink()
    with pytest.raises(ScoringError, match=r"b\.parquet is gone"):
        score(bundle, source, out, **asked)
