"""Bundles and input folders that the scoring tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posthoc.contract import Task
from tests.factory import COLUMNS, tiny_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("scoring") / "classifier", "classification")


@pytest.fixture(scope="session")
def regressor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("scoring") / "regressor", "regression")


def table(n: int, seed: int, task: Task = "classification", bad: tuple[int, ...] = ()) -> pa.Table:
    """Input columns, an id, and a pass-through column; rows in ``bad`` hold a NaN."""
    x = np.random.default_rng(seed).normal(size=(n, len(COLUMNS[task]))).astype(np.float32)
    x[list(bad), 0] = np.nan
    columns = {c: pa.array(x[:, i]) for i, c in enumerate(COLUMNS[task])}
    ids = [f"{seed}-{i}" for i in range(n)]
    days = pa.array(np.arange(n) % 7, pa.int8())
    return pa.table({**columns, "id": pa.array(ids), "day": days})


def write_input(
    folder: Path,
    files: int,
    rows: int,
    task: Task = "classification",
    bad: dict[int, tuple[int, ...]] | None = None,
) -> Path:
    """``files`` Parquet files in two Hive-like sub-folders; ``bad`` maps a file to its bad rows."""
    for i in range(files):
        path = folder / f"half={i % 2}" / f"part-{i:02d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(rows + i, i, task, (bad or {}).get(i, ())), path)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def outputs(folder: Path) -> list[str]:
    """Names of the committed fragments in an output folder."""
    return [
        name
        for name in tree(folder)
        if name.endswith(".parquet") and not any(p.startswith(("_", ".")) for p in name.split("/"))
    ]
