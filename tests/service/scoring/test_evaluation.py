"""Labels beside scored rows, against `hedged evaluate`, slow loops, and runs that were killed."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from calibration.evaluate import evaluate
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.metrics.totals import RegressionTotals
from calibration.predictor import Predictor
from posthoc.contract import DataError
from service.scoring import ScoringError, labelled, score
from service.scoring.labelled import labels_of
from service.scoring.measures import EVALUATION
from tests.factory import CLASSES, COLUMNS, data, frozen_model, rows
from tests.service.scoring.conftest import outputs, tree
from tests.service.scoring.measured import (
    BATCH,
    FRESH,
    labelled_table,
    run_scored,
    told,
    write,
)
from tests.service.scoring.test_kill import child


def test_classification_equals_hedged_evaluate(bundle: Path, tmp_path: Path) -> None:
    table = labelled_table(bundle, "classification")
    got = run_scored(bundle, table, tmp_path)
    want = evaluate(bundle, tmp_path / "input.parquet")
    dropped = table.num_rows - want.n
    assert want.n > FRESH and dropped > 100  # the fit's own test rows stay
    assert got["rows"] == {
        **{"measured": want.n, "seen": dropped},
        **dict.fromkeys(("unlabelled", "wrong", "keyless", "refused"), 0),
    }
    system = next(s for s in want.systems if s.name == "hedged")
    for name in ("accuracy", "nll", "brier", "ece", "debiased_ece"):
        # Batches of other shapes: float32 probabilities may differ in their last digit.
        assert got["metrics"][name]["value"] == pytest.approx(system.metrics[name].value, abs=1e-6)
    level = want.levels[0]
    found = got["levels"][level.level]
    assert found["coverage"]["value"] == pytest.approx(level.coverage, abs=1e-9)
    assert found["mean_size"] == pytest.approx(level.mean_size, abs=1e-9)
    assert (found["band_low"], found["band_high"]) == (level.band_low, level.band_high)
    reliability = system.reliability
    assert reliability is not None
    assert tuple(b["labelled"] for b in got["bins"] if b["labelled"]) == reliability.count


def test_regression_equals_hedged_evaluate(regressor: Path, tmp_path: Path) -> None:
    got = run_scored(regressor, labelled_table(regressor, "regression"), tmp_path)
    want = evaluate(regressor, tmp_path / "input.parquet")
    assert got["rows"]["measured"] == want.n
    system = next(s for s in want.systems if s.name == "hedged")
    for name in ("rmse", "mae", "crps", "nll", "pce"):
        assert got["metrics"][name]["value"] == pytest.approx(system.metrics[name].value, abs=1e-6)
    pce = system.metrics["pce"]
    assert (got["metrics"]["pce"]["low"], got["metrics"]["pce"]["high"]) == (pce.low, pce.high)
    level = want.levels[0]
    found = got["levels"][level.level]
    assert found["coverage"]["value"] == pytest.approx(level.coverage, abs=1e-9)
    assert found["mean_size"] == pytest.approx(level.mean_size, abs=1e-6)


def test_every_row_counts_once_and_where_it_belongs(bundle: Path, tmp_path: Path) -> None:
    table = labelled_table(bundle, "classification", 120, 40)
    truth: list[str | None] = table["target"].to_pylist()
    for row in range(0, 150, 10):
        truth[row] = None
    for row in range(5, 60, 10):
        truth[row] = "zebra"
    x = table["a"].to_numpy().copy()
    x[[0, 1, 5]] = np.nan  # bad rows count nowhere, whatever their label
    table = table.set_column(0, "a", pa.array(x)).set_column(
        table.schema.get_field_index("target"), "target", pa.array(truth)
    )
    got = run_scored(bundle, table, tmp_path)["rows"]
    roles = pq.read_table(bundle / "reference.parquet")["role"].to_pylist()[:40]
    fitted = {120 + i for i, role in enumerate(roles) if role != "test"}
    want = dict.fromkeys(got, 0)
    for row, value in enumerate(truth):
        if row in (0, 1, 5):
            continue
        kind = "unlabelled" if value is None else "wrong" if value == "zebra" else "measured"
        want["seen" if kind == "measured" and row in fitted else kind] += 1
    assert got == want and min(want[k] for k in ("measured", "seen", "wrong", "unlabelled")) > 4
    out = pq.read_table(tmp_path / "out" / "input.parquet")
    assert out.num_rows == 157  # a wrong label is no bad row


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.float64(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.large_string(),
    ],
)
def test_labels_of_any_type(bundle: Path, tmp_path: Path, kind: pa.DataType) -> None:
    table = labelled_table(bundle, "classification", 90, 0)
    text = run_scored(bundle, table, tmp_path)
    names: list[str] = table["target"].to_pylist()
    index = [CLASSES.index(name) for name in names]
    column = (
        pa.array(names if pa.types.is_large_string(kind) else index, kind)
        if not (pa.types.is_dictionary(kind))
        else pa.array(names).dictionary_encode()
    )
    (tmp_path / "other").mkdir()
    at = table.schema.get_field_index("target")
    other = run_scored(bundle, table.set_column(at, "target", column), tmp_path / "other")
    assert other["metrics"] == text["metrics"] and other["levels"] == text["levels"]


def test_text_is_read_as_numbers_where_there_are_no_names(regressor: Path, tmp_path: Path) -> None:
    table = labelled_table(regressor, "regression", 90, 0)
    numbers = run_scored(regressor, table, tmp_path)
    texts = [repr(v) for v in table["target"].to_pylist()]
    at = table.schema.get_field_index("target")
    (tmp_path / "text").mkdir()
    same = run_scored(regressor, table.set_column(at, "target", pa.array(texts)), tmp_path / "text")
    assert same["metrics"] == numbers["metrics"]
    texts[3], texts[4], texts[5], texts[6] = "", "n/a", "inf", "nan"
    (tmp_path / "faulty").mkdir()
    faulty = run_scored(
        regressor, table.set_column(at, "target", pa.array(texts)), tmp_path / "faulty"
    )
    assert faulty["rows"]["measured"] == 86
    assert (faulty["rows"]["unlabelled"], faulty["rows"]["wrong"]) == (2, 2)


def test_a_target_beyond_all_measure_ends_no_run(regressor: Path, tmp_path: Path) -> None:
    table = labelled_table(regressor, "regression", 90, 0)
    truth = table["target"].to_pylist()
    truth[7] = 1e200
    at = table.schema.get_field_index("target")
    got = run_scored(regressor, table.set_column(at, "target", pa.array(truth)), tmp_path)
    assert got["rows"]["measured"] == 90
    assert got["metrics"]["rmse"]["value"] is None and got["metrics"]["nll"]["value"] is None
    assert got["metrics"]["mae"]["value"] == pytest.approx(1e200 / 90)
    assert got["metrics"]["pce"]["value"] < 0.2


@pytest.mark.parametrize("listed", [False, True])
def test_several_outputs_have_several_labels(regressor: Path, listed: bool) -> None:
    columns = ("v",) if listed else ("v", "w")
    schema = pa.schema([("v", pa.float64())])
    labels = replace(labels_of(Predictor(regressor), ["v"], None, schema), columns=columns, width=2)
    rng = np.random.default_rng(0)
    y, mean, std = rng.normal(size=(3, 40, 2))
    std = np.abs(std) + 0.5
    rows: list[dict[str, Any]] = [
        {"v": r.tolist()} if listed else {"v": r[0], "w": r[1]} for r in y
    ]
    rows[3] = {"v": None} if listed else {"v": 1.0, "w": None}
    rows[4] = {"v": [1.0, math.inf]} if listed else {"v": 1.0, "w": math.inf}
    made = {"mean": mean, "std": std, "lower": mean - std, "upper": mean + std}
    found = labelled.measure(
        labels,
        labelled.nothing(labels),
        np.arange(40, dtype=np.uint64),
        pa.RecordBatch.from_pylist(rows),
        made,
    )
    assert (found.n, found.unlabelled, found.wrong) == (38, 1, 1)
    good = [r for r in range(40) if r not in (3, 4)]
    squares = [sum((y[r] - mean[r]) ** 2) / 2 for r in good]
    assert isinstance(found.totals, RegressionTotals)
    assert found.totals.squared_error_sum == pytest.approx(sum(squares))
    assert found.squares["squared_error"] == pytest.approx(sum(s * s for s in squares))
    inside = [all(abs(y[r] - mean[r]) <= std[r]) for r in good]
    assert found.totals.levels["0.9"].covered == sum(inside)
    again = labelled.from_json(labels, json.loads(json.dumps(labelled.to_json(found))))
    assert labelled.to_json(again) == labelled.to_json(found)
    halves = [good[:19], good[19:]]
    parts = []
    for half in halves:
        part = {k: v[half] for k, v in made.items()}
        beside = pa.RecordBatch.from_pylist([rows[r] for r in half])
        hashes = np.arange(len(half), dtype=np.uint64)
        parts.append(labelled.measure(labels, labelled.nothing(labels), hashes, beside, part))
    both = labelled.merged(*parts)
    assert both.totals.n == 38 and both.totals.levels == found.totals.levels
    for name, total in both.squares.items():
        assert total == pytest.approx(found.squares[name])


def test_labels_of_a_csv_file(bundle: Path, tmp_path: Path) -> None:
    table = labelled_table(bundle, "classification", 90, 0)
    want = run_scored(bundle, table, tmp_path)
    pacsv.write_csv(table, tmp_path / "rows.csv")
    score(bundle, tmp_path / "rows.csv", tmp_path / "csv", labels=["target"], batch_size=BATCH)
    got = told(tmp_path / "csv")
    assert got["rows"] == want["rows"] and got["levels"] == want["levels"]
    assert got["metrics"]["nll"]["value"] == pytest.approx(want["metrics"]["nll"]["value"])


def test_a_killed_run_tells_the_same(bundle: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in", labelled_table(bundle, "classification", 500, 100), 6)
    settings: dict[str, Any] = {"bundle": str(bundle), "input": str(source), "batch_size": BATCH}
    settings |= {"labels": ["target"]}
    score(**settings, output=str(tmp_path / "whole"))
    whole = tree(tmp_path / "whole")
    halfway = 0
    for seed, phase in enumerate(("writing", "renaming")):
        output = tmp_path / f"out-{seed}"
        ask = {"score": {**settings, "output": str(output)}, "watch": True}
        killed = child(**ask, kill=(phase, 17 + seed))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        halfway += 0 < len(outputs(output)) < 6
        score(**settings, output=str(output))
        assert tree(output) == whole
    assert halfway == 2
    assert {EVALUATION, "_drift.json", "_SUCCESS"} <= set(whole)


def test_files_cut_otherwise_give_the_same_figures(bundle: Path, tmp_path: Path) -> None:
    table = labelled_table(bundle, "classification", 512, 128)
    found = []
    for files in (1, 5):
        source = write(tmp_path / f"in-{files}", table, files)
        score(bundle, source, tmp_path / f"out-{files}", labels=["target"], batch_size=BATCH)
        found.append(told(tmp_path / f"out-{files}"))
    one, five = found
    assert one["rows"] == five["rows"] and one["levels"] == five["levels"]
    for name, figure in one["metrics"].items():
        assert figure["value"] == pytest.approx(five["metrics"][name]["value"], abs=1e-9)


def test_what_is_written_does_not_matter(bundle: Path, tmp_path: Path) -> None:
    table = labelled_table(bundle, "classification", 200, 50)
    whole = run_scored(bundle, table, tmp_path)
    (tmp_path / "few").mkdir()
    few = run_scored(bundle, table, tmp_path / "few", outputs=["label", "ood"])
    assert {k: v for k, v in few.items() if k != "run"} == {
        k: v for k, v in whole.items() if k != "run"
    }
    written = pq.read_table(tmp_path / "few" / "out" / "input.parquet")
    assert written.column_names == ["row", "id", "label", "ood"]
    plain = tmp_path / "plain"
    score(bundle, tmp_path / "few" / "input.parquet", plain, outputs=["label"], batch_size=BATCH)
    assert pq.read_table(plain / "input.parquet")["label"] == written["label"]
    assert not (plain / EVALUATION).exists()


def test_another_level_is_measured_at_that_level(bundle: Path, tmp_path: Path) -> None:
    table = labelled_table(bundle, "classification", 400, 0)
    got = run_scored(bundle, table, tmp_path, alpha=0.3)
    out = pq.read_table(tmp_path / "out" / "input.parquet")
    truth = table["target"].to_pylist()
    hit = [y in members for y, members in zip(truth, out["set"].to_pylist(), strict=True)]
    assert list(got["levels"]) == ["0.7"]
    figure = got["levels"]["0.7"]["coverage"]
    assert figure["value"] == sum(hit) / 400
    exact = binomtest(sum(hit), 400).proportion_ci(0.95, "exact")
    assert (figure["low"], figure["high"]) == pytest.approx((exact.low, exact.high), abs=1e-9)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose rows come from customers, ten rows each."""
    folder = tmp_path_factory.mktemp("grouped")
    table = pq.read_table(data(folder / "rows.parquet", n=3000))
    customers = pa.array([f"c{i // 10}" for i in range(table.num_rows)])
    pq.write_table(table.append_column("customer", customers), folder / "rows.parquet")
    fit(
        frozen_model(folder / "model.onnx"),
        folder / "rows.parquet",
        folder / "bundle",
        FitOptions(task="classification"),
        columns=Columns(
            target="target",
            inputs={"x": COLUMNS["classification"]},
            split_by="customer",
            id="id",
            classes=CLASSES,
        ),
    )
    return folder / "bundle"


def test_siblings_of_fitted_rows_are_not_measured(grouped: Path, tmp_path: Path) -> None:
    x, y = rows("classification", 400, 5)
    owners: list[str | None] = [f"c{i}" if i < 250 else f"new{i}" for i in range(400)]
    owners[399] = None
    table = pa.table(
        {c: x[:, i] for i, c in enumerate(COLUMNS["classification"])}
        | {"target": np.asarray(CLASSES)[y], "customer": owners}
    )
    got = run_scored(grouped, table, tmp_path)
    reference = pq.read_table(grouped.parent / "rows.parquet", columns=["customer"])
    roles = pq.read_table(grouped / "reference.parquet")["role"].to_pylist()
    of = dict(zip(reference["customer"].to_pylist(), roles, strict=True))
    seen = sum(of.get(owner or "", "test") != "test" for owner in owners)
    assert got["rows"]["seen"] == seen > 100
    assert (got["rows"]["keyless"], got["rows"]["measured"]) == (1, 399 - seen)
    assert any("split key" in note for note in got["notes"])
    figures = [*got["metrics"].values(), *(v["coverage"] for v in got["levels"].values())]
    assert all(f["low"] is f["high"] is None for f in figures)  # rows are no independent evidence
    assert got["levels"]["0.9"]["band_low"] is None
    with pytest.raises(DataError, match="'customer' is needed"):
        pq.write_table(table.drop_columns(["customer"]), tmp_path / "bare.parquet")
        score(grouped, tmp_path / "bare.parquet", tmp_path / "bare", labels=["target"])


def test_labels_that_cannot_be_meant(
    bundle: Path, regressor: Path, maps_root: Path, tmp_path: Path
) -> None:
    table = labelled_table(bundle, "classification", 50, 0)
    lists = pa.array([[0, 1]] * 50)
    pq.write_table(table.append_column("lists", lists), tmp_path / "in.parquet")
    source, out = tmp_path / "in.parquet", tmp_path / "out"
    with pytest.raises(DataError, match="column 'truth' is needed"):
        score(bundle, source, out, labels=["truth"])
    with pytest.raises(DataError, match="'lists'"):
        score(bundle, source, out, labels=["lists"])
    with pytest.raises(DataError, match="one target column"):
        score(bundle, source, out, labels=["target", "id"])
    pq.write_table(labelled_table(regressor, "regression", 50, 0), tmp_path / "values.parquet")
    with pytest.raises(DataError, match="2 columns for 1 outputs"):
        score(regressor, tmp_path / "values.parquet", out, labels=["target", "p"])
    with pytest.raises(DataError, match="hedged evaluate"):
        score(maps_root / "segmenter/1", source, out, labels=["target"])
    assert not out.exists()
    score(bundle, source, out, labels=["target"])
    with pytest.raises(ScoringError, match=r"settings labels was \('target',\), is \(\)"):
        score(bundle, source, out)
