"""The public functions of Python take what the command line takes, and refuse early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hedged
from posthoc.contract import DataError, FitError
from tests.factory import CLASSES, COLUMNS, data, frozen_model, rows
from tests.hedged.conftest import Call


def table(path: Path, n: int, seed: int, *, labelled: bool = True) -> Path:
    x, y = rows("classification", n, seed)
    columns: dict[str, Any] = {c: x[:, i] for i, c in enumerate(COLUMNS["classification"])}
    if labelled:
        columns["region"] = np.where(np.arange(n) % 3 == 0, "north", "east")
        columns["target"] = np.asarray(CLASSES)[y]
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    return {
        "model": frozen_model(tmp_path / "model.onnx", "classification"),
        "data": table(tmp_path / "data.parquet", 1200, 0),
        "out": tmp_path / "bundle",
        "task": "classification",
        "target": "target",
        "inputs": {"x": list(COLUMNS["classification"])},
        "classes": list(CLASSES),
        "method": "none",
        "source": {"cache_dir": tmp_path / "cache"},
    }


def test_groups_and_production_rows_are_named(asked: dict[str, Any], tmp_path: Path) -> None:
    bundle = hedged.fit(**asked, group="region", given="group")
    assert bundle.manifest.mapping.group == "region"
    assert bundle.manifest.conformal.given == "group"
    coming = table(tmp_path / "coming.parquet", 600, 1, labelled=False)
    weighted = hedged.fit(**asked | {"out": tmp_path / "b"}, production=coming, shift="target")
    assert weighted.manifest.conformal.shift == "target"


def test_what_the_model_shows_to_be_impossible_is_said_before_a_pass(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(FitError, match="--scaling beta is for two classes and this model has 3"):
        hedged.fit(**asked, scaling="beta")
    with pytest.raises(DataError, match="--pixels is for a model of maps"):
        hedged.fit(**asked | {"source": {**asked["source"], "pixels": 16}})
    assert not (tmp_path / "cache").exists()


def test_an_evaluation_is_shown_as_the_command_shows_it(
    classification_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: Call
) -> None:
    fresh = data(tmp_path / "fresh.parquet", n=300, seed=3)
    hedged.show(hedged.evaluate(classification_bundle, fresh))
    shown = capsys.readouterr().out
    done = call("evaluate", classification_bundle, "--data", fresh, "-o", tmp_path / "out")
    assert shown and done.out == f"{shown}report: {tmp_path / 'out' / 'report.html'}\n"
