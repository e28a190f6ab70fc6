"""Rows that share a split key are one item: ranks, flags and bands count items."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import binom

from calibration.bundle import Bundle, threshold_at
from calibration.evaluate import evaluate
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns, one_per_key
from tests.factory import CLASSES, COLUMNS, frozen_model, rows

ITEMS, COPIES = 600, 6


def table(path: Path, seed: int) -> Path:
    """Each item as six near-copies with one label."""
    x, y = rows("classification", ITEMS, seed)
    rng = np.random.default_rng(seed)
    near = np.repeat(x, COPIES, 0) + rng.normal(size=(ITEMS * COPIES, 4)).astype("f4") * 0.01
    columns = {c: near[:, i] for i, c in enumerate(COLUMNS["classification"])}
    columns["item"] = np.repeat(np.arange(ITEMS) + seed * ITEMS, COPIES)
    columns["target"] = np.asarray(CLASSES)[np.repeat(y, COPIES)]
    pq.write_table(pa.table(columns), path)
    return path


def fitted(folder: Path, name: str, split_by: str | None) -> Bundle:
    columns = Columns(
        target="target",
        inputs={"x": COLUMNS["classification"]},
        split_by=split_by,
        classes=CLASSES,
    )
    return fit(
        frozen_model(folder / "model.onnx"),
        table(folder / "data.parquet", 1),
        folder / name,
        FitOptions(task="classification"),
        columns=columns,
        cache_dir=folder / "cache",
    )


def test_promises_count_items(tmp_path: Path) -> None:
    bundle = fitted(tmp_path, "grouped", "item")
    splits = bundle.manifest.splits
    assert splits.by == "item" and splits.items is not None
    assert sum(splits.items.values()) == ITEMS
    assert splits.rows["conformal"] == COPIES * splits.items["conformal"]
    n = splits.items["conformal"]
    assert {g.n for g in bundle.manifest.conformal.guarantees} == {n}
    assert bundle.manifest.ood is not None and bundle.manifest.ood.n == n
    assert bundle.manifest.abstain is not None and bundle.manifest.abstain.n == n
    assert len(bundle.conformal_scores["set"]) == n


def test_siblings_of_what_the_fit_saw_are_not_evaluated_and_bands_are_wide(tmp_path: Path) -> None:
    bundle = fitted(tmp_path, "grouped", "item")
    found = evaluate(bundle, table(tmp_path / "again.parquet", 1))
    items = bundle.manifest.splits.items
    assert items is not None
    assert found.n == items["test"] * COPIES
    # A band of that many independent rows would be far narrower.
    (level, _) = found.levels
    assert level.band_high - level.band_low > 0.8 * 5 * np.sqrt(0.09 / items["test"])


def test_one_row_of_each_key_is_kept_by_hash() -> None:
    keys = np.asarray([7, 7, 3, 3, 3, 9], np.uint64)
    hashes = np.asarray([5, 2, 8, 1, 4, 6], np.uint64)
    cache = SimpleNamespace(per=1, split_keys=keys, content_hashes=hashes)
    kept = one_per_key(cache, np.arange(6))  # type: ignore[arg-type]
    assert kept.tolist() == [1, 3, 5]
    assert one_per_key(cache, np.asarray([0, 2, 4])).tolist() == [0, 4]  # type: ignore[arg-type]


def test_copies_counted_as_rows_would_break_coverage_and_items_keep_it() -> None:
    """10 items of 100 equal scores at level 0.95: ranked as 1,000 rows they cover 10/11; ranked as
    10 items they are too few, and the set is everything."""
    draws, below_rows, below_items = 2000, 0, 0
    rng = np.random.default_rng(0)
    for _ in range(draws):
        scores = np.sort(rng.uniform(size=10))
        fresh = rng.uniform()
        below_rows += fresh <= threshold_at(np.repeat(scores, 100), 0.05)
        below_items += fresh <= threshold_at(scores, 0.05)
    assert below_rows < binom.ppf(0.001, draws, 0.95)
    assert below_items == draws
