"""A batch beside the bundle's reference: counts against slow loops, and batches that did move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ks_2samp

from calibration.bundle import load_bundle
from calibration.drift.label_free import EXPECTED_ASSUMES
from calibration.metrics.totals import bin_index
from calibration.predictor import Predictor
from posthoc.contract import Task
from service.scoring import score
from service.scoring.drift import (
    COMPARED,
    Reference,
    from_json,
    look,
    merged,
    nothing,
    reference_of,
    to_json,
)
from service.scoring.measures import DRIFT, Measures, measures_of
from tests.factory import COLUMNS, rows
from tests.service.scoring.conftest import tree

FIELDS = ("confidence", "ood_score", "ood_pvalue", "ood")


def scored(bundle: Path, tmp: Path, task: Task = "classification", shift: float = 0.0) -> Any:
    x, _ = rows(task, 2000, 11)
    tmp.mkdir(parents=True)
    columns = {c: x[:, i] + np.float32(shift) for i, c in enumerate(COLUMNS[task])}
    pq.write_table(pa.table(columns), tmp / "input.parquet")
    summary = score(bundle, tmp / "input.parquet", tmp / "out")
    found = json.loads((tmp / "out" / DRIFT).read_text(), parse_constant=pytest.fail)
    assert summary.drift == found
    return found


def fields(n: int, seed: int) -> dict[str, np.ndarray]:
    """Values with ties, some of them those of edges."""
    rng = np.random.default_rng(seed)
    return {
        "confidence": rng.choice(np.linspace(0, 1, 41), n).astype(np.float32),
        "ood_score": rng.normal(size=n).astype(np.float32),
        "ood_pvalue": (rng.integers(1, 50, n) / 50).astype(np.float32),
        "ood": rng.random(n) < 0.1,
    }


@given(n=st.integers(1, 200), cut=st.integers(0, 200), seed=st.integers(0, 20))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_counts_are_those_of_a_loop_however_rows_are_cut(
    bundle: Path, n: int, cut: int, seed: int
) -> None:
    reference, made, cut = reference_of(load_bundle(bundle), FIELDS), fields(n, seed), min(cut, n)
    seen = nothing(reference)
    parts = [{k: v[:cut] for k, v in made.items()}, {k: v[cut:] for k, v in made.items()}]
    for part in parts:
        count = len(part["ood"])
        seen = merged(seen, look(reference, nothing(reference), part, count)) if count else seen
    assert list(seen.bins) == [f for f in COMPARED if f in FIELDS]
    for name, counts in seen.bins.items():
        index = [sum(float(v) > e for e in reference.edges[name]) for v in made[name]]
        assert counts.tolist() == np.bincount(index, minlength=len(counts)).tolist()
    index = bin_index(made["confidence"])
    sums = [
        sum(float(c) for c, i in zip(made["confidence"], index, strict=True) if i == b)
        for b in range(20)
    ]
    assert seen.count.tolist() == np.bincount(index, minlength=20).tolist()
    np.testing.assert_allclose(seen.confidence_sum, sums, rtol=1e-12)
    assert (seen.n, seen.flagged) == (n, int(made["ood"].sum()))
    again = from_json(reference, json.loads(json.dumps(to_json(seen))))
    assert to_json(again) == to_json(seen)


def test_the_reference_is_cut_into_twenty_like_parts(bundle: Path) -> None:
    reference = reference_of(load_bundle(bundle), FIELDS)
    table = pq.read_table(bundle / "reference.parquet")
    for name, counts in reference.counts.items():
        values = table[name].to_numpy()
        assert counts.sum() == np.isfinite(values).sum() > 900
        assert len(counts) == 20 and counts.min() > 0.8 * counts.mean()
        gaps = np.abs(reference.edges[name][:, None] - values[np.isfinite(values)][None])
        assert gaps.min() > 0  # no value lies on an edge, where rounding would decide


def test_a_batch_like_the_reference_is_within_chance(bundle: Path, tmp_path: Path) -> None:
    found = scored(bundle, tmp_path / "like")
    assert list(found["compared"]) == ["confidence", "ood_score", "ood_pvalue"]
    out = pq.read_table(tmp_path / "like" / "out" / "input.parquet")
    reference = pq.read_table(bundle / "reference.parquet")
    for name, d in found["compared"].items():
        assert d["ks"] < d["ks_floor"] and d["psi"] < d["psi_floor"]
        known = reference[name].to_numpy()
        exact = ks_2samp(known[np.isfinite(known)], out[name].to_numpy()).statistic
        assert exact - 0.05 <= d["ks"] <= exact + 1e-9  # at 19 edges, each a twentieth apart
        assert sum(d["counts"]) == found["rows"] == 2000
    hits = int(np.sum(out["ood"].to_pylist()))
    flagged, exact = found["flagged"], binomtest(hits, 2000).proportion_ci(0.95, "exact")
    assert flagged["flagged"] == hits and flagged["nominal"] == 0.05
    assert (flagged["low"], flagged["high"]) == pytest.approx((exact.low, exact.high))
    expected = found["expected_accuracy"]
    assert expected["accuracy"] == pytest.approx(out["confidence"].to_numpy().mean(), abs=1e-6)
    assert expected["assumes"] == EXPECTED_ASSUMES
    assert "6 distances" in found["notes"][-1] and "0.06" in found["notes"][-1]


def test_a_batch_that_moved_is_above(bundle: Path, tmp_path: Path) -> None:
    found = scored(bundle, tmp_path / "moved", shift=1.5)
    for name in ("ood_score", "ood_pvalue"):
        d = found["compared"][name]
        assert d["ks"] > 3 * d["ks_floor"] and d["psi"] > 3 * d["psi_floor"]
    assert found["flagged"]["low"] > found["flagged"]["nominal"]


def test_regression_has_no_accuracy_to_expect(regressor: Path, tmp_path: Path) -> None:
    found = scored(regressor, tmp_path / "values", "regression")
    assert set(found["compared"]) == {"std", "ood_score", "ood_pvalue"}
    assert all(d["ks"] < d["ks_floor"] for d in found["compared"].values())
    written = pq.read_table(tmp_path / "values" / "out" / "input.parquet")["std"].to_numpy()
    d = found["compared"]["std"]
    assert np.mean(written <= d["edges"][9]) == sum(d["counts"][:10]) / 2000
    assert found["expected_accuracy"] is None
    assert found["flagged"]["share"] < 0.2


def test_outputs_of_several_values_are_compared_by_their_mean() -> None:
    reference = Reference({"std": np.array([1.0, 2.0])}, {"std": np.array([1, 1, 1])}, False, False)
    std = np.array([[0.5, 1.4], [1.0, 3.0], [2.0, 2.5]], np.float32)
    seen = look(reference, nothing(reference), {"std": std}, 3)
    assert seen.bins["std"].tolist() == [1, 1, 1]


def test_only_what_is_written_is_compared(bundle: Path, tmp_path: Path) -> None:
    x, _ = rows("classification", 50, 3)
    columns = {c: x[:, i] for i, c in enumerate(COLUMNS["classification"])}
    pq.write_table(pa.table(columns), tmp_path / "input.parquet")
    score(bundle, tmp_path / "input.parquet", tmp_path / "out", outputs=["label", "confidence"])
    found = json.loads((tmp_path / "out" / DRIFT).read_text())
    assert list(found["compared"]) == ["confidence"] and found["flagged"] is None
    score(bundle, tmp_path / "input.parquet", tmp_path / "label", outputs=["label"])
    none = json.loads((tmp_path / "label" / DRIFT).read_text())
    assert (none["rows"], none["compared"], none["notes"]) == (50, {}, [])


def test_a_run_of_no_rows_says_nothing(bundle: Path, tmp_path: Path) -> None:
    schema = pa.schema([(c, pa.float32()) for c in COLUMNS["classification"]])
    pq.write_table(schema.empty_table(), tmp_path / "input.parquet")
    summary = score(bundle, tmp_path / "input.parquet", tmp_path / "out")
    found = json.loads((tmp_path / "out" / DRIFT).read_text())
    assert (found["rows"], found["compared"], found["expected_accuracy"]) == (0, {}, None)
    assert summary.lines == ()


def test_measurements_that_were_damaged_are_made_again(bundle: Path, tmp_path: Path) -> None:
    scored(bundle, tmp_path / "run")
    before = tree(tmp_path / "run" / "out")
    out = tmp_path / "run" / "out" / "input.parquet"
    table, kept = pq.read_table(out), pq.read_metadata(out).metadata[b"hedged"]
    stamp = json.loads(kept)
    stamp["measured"] = stamp["measured"].replace('"flagged"', '"wrong"')
    pq.write_table(table.replace_schema_metadata({"hedged": json.dumps(stamp)}), out)
    assert score(bundle, tmp_path / "run" / "input.parquet", tmp_path / "run" / "out").resumed == 0
    assert tree(tmp_path / "run" / "out") == before


def test_what_a_footer_keeps_is_exact_and_nothing_else_is_taken(bundle: Path) -> None:
    schema = pa.schema([("y", pa.string())])
    measures = measures_of(Predictor(bundle), FIELDS, None, ["y"], schema)
    x, y = rows("classification", 300, 2)
    predictor = Predictor(bundle, threads=1)
    made = predictor.run({"x": x})
    beside = pa.RecordBatch.from_pydict({"y": [("a", "b", "c")[i] for i in y]}, schema=schema)
    found = measures.add(measures.start(), np.arange(300, dtype=np.uint64), beside, made)
    text = measures.to_text(found)
    again = measures.from_text(text)
    assert again is not None and measures.to_text(again) == text
    assert len(text) < 4000  # of every footer
    for wrong in ("", "[]", "{}", text[:-2], text.replace('"count":[', '"count":[1,')):
        assert measures.from_text(wrong) is None
    assert Measures().from_text("{}") is not None
