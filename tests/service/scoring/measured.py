"""Runs with labels, and what they tell: shared by the tests of `_evaluation.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posthoc.contract import Task
from service.scoring import score
from service.scoring.measures import EVALUATION
from tests.factory import CLASSES, COLUMNS, rows

BATCH = 64
FRESH, FITTED = 700, 300


def labelled_table(
    bundle: Path, task: Task, n: int = FRESH, fitted: int = FITTED, seed: int = 7
) -> pa.Table:
    """Fresh rows, and then some of the very rows that the bundle was fitted with."""
    x, y = rows(task, n, seed)
    fresh = {c: x[:, i] for i, c in enumerate(COLUMNS[task])}
    truth = pa.array(np.asarray(CLASSES)[y]) if task == "classification" else pa.array(y)
    table = pa.table({**fresh, "id": [f"n{i}" for i in range(n)], "target": truth})
    return pa.concat_tables(
        [table, pq.read_table(bundle.parent / f"{bundle.name}.parquet")[:fitted]]
    )


def write(folder: Path, table: pa.Table, files: int) -> Path:
    folder.mkdir(parents=True)
    size = -(-table.num_rows // files)
    for i in range(files):
        pq.write_table(table.slice(i * size, size), folder / f"part-{i}.parquet")
    return folder


def told(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / EVALUATION).read_text())
    return found


def run_scored(bundle: Path, table: pa.Table, tmp: Path, **options: Any) -> dict[str, Any]:
    pq.write_table(table, tmp / "input.parquet")
    settings = {"labels": ["target"], "batch_size": BATCH, **options}
    score(bundle, tmp / "input.parquet", tmp / "out", **settings)
    return told(tmp / "out")
