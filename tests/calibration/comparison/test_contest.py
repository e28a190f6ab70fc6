"""Comparisons of a small model, from its table to the recommendation."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibration.compare import compare
from calibration.comparison.contest import Asked, contest, lock
from calibration.comparison.records import Comparison
from calibration.comparison.tables import write_tables
from calibration.fit_options import FitOptions
from calibration.material import Columns, Material, prepare
from calibration.proxies import HELD_OUT
from calibration.strange import given_sets, labelled_sets
from posthoc.contract import DataError, FitError, Task
from tests.factory import CLASSES, COLUMNS, data, frozen_model

FAST = ("laplace_diag", "gaussian")


def columns(task: Task) -> Columns:
    classes = CLASSES if task == "classification" else None
    return Columns(target="target", id="id", classes=classes)


def material(folder: Path, task: Task, n: int = 1500) -> Material:
    return prepare(
        frozen_model(folder / "model.onnx", task),
        data(folder / "data.parquet", task, n, 0),
        options=FitOptions(task=task),
        columns=columns(task),
        cache_dir=folder / "cache",
    )


def strange(path: Path, n: int = 300) -> Path:
    rng = np.random.default_rng(5)
    names = COLUMNS["classification"]
    pq.write_table(pa.table({c: rng.normal(4, 1, size=n).astype("f4") for c in names}), path)
    return path


def run(folder: Path, task: Task, asked: Asked, **options: Any) -> Comparison:
    return compare(
        frozen_model(folder / "model.onnx", task),
        data(folder / "data.parquet", task, 1500, 0),
        FitOptions(task=task, **options),
        asked,
        columns=columns(task),
        cache_dir=folder / "cache",
    )


def test_locked_rows_take_no_part(tmp_path: Path) -> None:
    whole = material(tmp_path, "classification")
    rest, locked = lock(whole, 0.2)
    assert np.intersect1d(rest.usable, locked).size == 0
    assert sorted([*rest.usable, *locked]) == list(whole.usable)
    assert 0.15 < len(locked) / len(whole.usable) < 0.25
    asked = Asked(methods=("laplace_diag",), scores=("gen",), splits=2, workers=1)
    options = FitOptions(task="classification", method="none")
    first = contest(whole, options, asked, ["none", "laplace_diag"], [], {}).comparison
    # Other labels on the locked rows change their figures and nothing else.
    y = np.array(whole.cache.y)
    y[locked] = (y[locked] + 1) % 3
    moved = dataclasses.replace(whole, cache=dataclasses.replace(whole.cache, y=y))
    second = contest(moved, options, asked, ["none", "laplace_diag"], [], {}).comparison
    same = [s.model_copy(update={"fit_seconds": None}) for s in first.standings]
    assert same == [s.model_copy(update={"fit_seconds": None}) for s in second.standings]
    assert first.scores == second.scores
    assert first.final[0].metrics["nll"].value + 0.5 < second.final[0].metrics["nll"].value


def test_a_comparison_is_the_same_in_one_process_or_two(tmp_path: Path) -> None:
    asked = {"methods": FAST, "scores": ("gen", "gen+mahalanobis", "knn"), "splits": 2}
    one = run(tmp_path, "classification", Asked(**asked, workers=1))
    assert one.model_rows == 1500  # one pass of the model
    two = run(tmp_path, "classification", Asked(**asked, workers=2))
    assert two.model_rows == 0  # none: they are cached

    def bare(found: Comparison) -> Any:
        kept = [
            s.model_copy(update={"fit_seconds": None, "ms_per_row": None}) for s in found.standings
        ]
        return kept, found.scores, found.final, found.recommendation

    assert bare(one) == bare(two)
    names = {s.name for s in one.standings}
    assert {"none", "laplace_diag", "none + ets", "gaussian + svs"} <= names
    assert all(s.rank and s.ms_per_row and s.fit_seconds for s in one.standings)
    means = [s.figures["nll"].mean for s in one.standings]
    assert means[0] <= means[-1] and one.standings[0].to_best.value == 0
    assert one.final[0].name == "none" and one.recommendation.score is not None


def test_strange_rows_choose_and_test_by_halves(tmp_path: Path) -> None:
    asked = Asked(
        methods=(),
        scalings=("temperature",),
        scores=("gen", "mahalanobis"),
        splits=2,
        ood_data={"far": strange(tmp_path / "far.parquet")},
        corrupt=("noise",),
        workers=1,
    )
    found = run(tmp_path, "classification", asked)
    assert found.model_rows == 1500 + 300 + 750
    assert set(found.proxies) == {"far", "noise 3", HELD_OUT}
    assert set(found.scores[0].auroc) == {"far", "noise 3", HELD_OUT}
    assert found.final[0].ood["far"].value > 0.8
    write_tables(tmp_path / "out", found)
    assert Comparison.model_validate_json((tmp_path / "out/comparison.json").read_text()) == found
    with (tmp_path / "out/scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [r["score"] for r in lines] == [s.score for s in found.scores]
    assert float(lines[0]["far"]) == pytest.approx(found.scores[0].auroc["far"].mean)


def test_further_labelled_sets_are_measured_and_rank_nothing(tmp_path: Path) -> None:
    later = data(tmp_path / "later.parquet", "classification", 400, 9)
    asked = Asked(methods=(), scalings=("temperature",), scores=("gen",), splits=2, workers=1)
    alone = run(tmp_path, "classification", asked)
    more = dataclasses.replace(asked, labelled={"later": later}, corrupt=("noise",))
    found = run(tmp_path, "classification", more)
    (only,) = found.standings
    assert set(only.others) == {"later", "noise 3"}
    assert only.figures == alone.standings[0].figures
    assert set(found.scores[0].auroc) == {HELD_OUT, "noise 3"}  # later rows are not strange
    final = found.final[0]
    assert final.others["noise 3"]["accuracy"] < final.metrics["accuracy"].value
    assert abs(final.others["later"]["accuracy"] - final.metrics["accuracy"].value) < 0.1
    assert set(final.ood) == {"noise 3"}
    same = {"labelled": {"same": tmp_path / "data.parquet"}}
    with pytest.raises(DataError, match="among the rows of the first --data"):
        run(tmp_path, "classification", dataclasses.replace(asked, **same))
    far = pq.read_table(strange(tmp_path / "far.parquet"))
    ids = pa.array([f"f{i}" for i in range(len(far))])
    pq.write_table(far.append_column("id", ids), tmp_path / "far.parquet")
    bare = {"labelled": {"far": tmp_path / "far.parquet"}}
    with pytest.raises(DataError, match="no labels; give unlabelled strange rows as --ood-data"):
        run(tmp_path, "classification", dataclasses.replace(asked, **bare))


def test_a_sibling_of_a_row_is_no_further_row(tmp_path: Path) -> None:
    first = pq.read_table(data(tmp_path / "data.parquet", "classification", 1500, 0))
    later = pq.read_table(data(tmp_path / "later.parquet", "classification", 400, 9))
    files = pa.array([f"f{i // 3}" for i in range(1500)])
    pq.write_table(first.append_column("file", files), tmp_path / "data.parquet")
    others = pa.array([f"f{i}" if i < 300 else f"g{i}" for i in range(400)])
    pq.write_table(later.append_column("file", others), tmp_path / "later.parquet")
    split = dataclasses.replace(columns("classification"), split_by="file")
    pool = prepare(
        frozen_model(tmp_path / "model.onnx", "classification"),
        tmp_path / "data.parquet",
        options=FitOptions(task="classification"),
        columns=split,
        cache_dir=tmp_path / "cache",
    )
    how = {"cache_dir": tmp_path / "cache"}
    found, run = labelled_sets(pool, {"later": tmp_path / "later.parquet"}, "classification", how)
    assert run == 400 and len(found[0].rows) == 100


def test_a_further_cache_keeps_to_the_limit(tmp_path: Path) -> None:
    far = strange(tmp_path / "far.parquet", 3000)
    pool = material(tmp_path, "classification")
    told: list[tuple[str, int, int]] = []
    how = {"cache_dir": tmp_path / "c", "progress": lambda *seen: told.append(seen)}
    found, _ = given_sets(pool, {"far": far}, "classification", how)
    assert len(found[0].rows) == 3000 and told[-1] == ("far", 3000, 3000)
    with pytest.raises(DataError, match="raise --max-cache"):
        small = {"cache_dir": tmp_path / "d", "max_cache_bytes": 1000}
        given_sets(pool, {"far": far}, "classification", small)


def test_a_regression(tmp_path: Path) -> None:
    asked = Asked(methods=("laplace", "student_t"), by="crps", splits=2, workers=1)
    found = run(tmp_path, "regression", asked, conformal="absolute")
    assert {s.name for s in found.standings} == {"none", "laplace", "student_t"}
    assert {"nll", "crps", "rmse", "coverage", "width"} <= set(found.standings[0].figures)
    assert found.scores == () and "ood" not in found.recommendation.options
    assert "scaling" not in found.recommendation.options


@pytest.mark.parametrize(
    ("task", "asked", "text"),
    [
        ("classification", Asked(by="crps"), "--by crps does not rank a classification"),
        ("classification", Asked(splits=1), "two at least"),
        ("classification", Asked(locked=1.0), "--locked is a share"),
        ("classification", Asked(methods=("student_t",)), "is not a module for classification"),
        ("classification", Asked(methods=("abnn",)), "runs the network again"),
        ("classification", Asked(scalings=("beta",)), "is for two classes"),
        ("classification", Asked(scalings=("svz",)), "unknown scaling 'svz'; there are auto"),
        ("regression", Asked(scalings=("ets",)), "has one factor"),
        ("classification", Asked(corrupt=("rain",)), "no corruption of tables is called 'rain'"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, task: Task, asked: Asked, text: str) -> None:
    with pytest.raises((FitError, DataError), match=text):
        run(tmp_path, task, asked)
