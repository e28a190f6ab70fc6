"""``hedged demo`` as a person runs it: as a process, with everything that it promises; of a quarter
of the files, and of all of them in ``make test-long``."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from calibration.bundle import load_bundle
from calibration.predictor import Predictor
from tests.calibration.pages import read

SECONDS = 900.0  # a guard against hanging: beside other tests it takes longer than alone


@pytest.fixture(scope="module", params=["quick", pytest.param("whole", marks=pytest.mark.long)])
def size(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def folder(size: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def told(size: str, folder: Path) -> dict[str, Any]:
    """The one object on standard output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HEDGED_")}
    done = subprocess.run(
        [sys.executable, "-m", "hedged", "demo", "--json", "--out", str(folder)]
        + ["--quick"] * (size == "quick"),
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "6/6" in done.stderr  # the steps are told beside it
    story: dict[str, Any] = json.loads(done.stdout)
    return story


def test_every_promised_figure_is_there(told: dict[str, Any]) -> None:
    for who in ("frozen", "hedged"):
        figures = told[who]
        assert figures.keys() >= {"accuracy", "nll", "ece", "brier"}
        assert all(math.isfinite(v) and v >= 0 for v in figures.values())
        assert 0.5 < figures["accuracy"] <= 1
    assert told["ood_auroc"].keys() >= {"msp", "hedged"}
    assert told["coverage"].keys() == told["set_size"].keys() == {"0.1", "0.05"}
    for key in ("overhead_ratio", "metrics_ece", "numpy_ece"):
        assert isinstance(told[key], float)
    assert isinstance(told["http_equals_graph"], bool)
    assert isinstance(told["score_equals_http"], bool)


def test_the_paths_agree(told: dict[str, Any]) -> None:
    assert told["http_equals_graph"] is True
    assert told["score_equals_http"] is True
    assert abs(told["metrics_ece"] - told["numpy_ece"]) <= 1e-9
    assert 0 < told["numpy_ece"] < 0.2


def test_the_model_says_what_it_said(told: dict[str, Any]) -> None:
    assert told["hedged"]["accuracy"] == told["frozen"]["accuracy"]
    assert told["label_equal"] == 1.0


def test_the_error_bars_are_worth_something(told: dict[str, Any], size: str) -> None:
    if size == "whole":  # by a hundredth of a nat, which takes more rows to see
        assert told["hedged"]["nll"] < told["frozen"]["nll"]
    for alpha, coverage in told["coverage"].items():
        low, high = told["coverage_band"][alpha]
        assert low <= coverage <= high
        assert 0 < told["set_size"][alpha] < 3
    assert told["ood_auroc"]["hedged"] > 0.9


def test_the_fused_graph_is_no_burden(told: dict[str, Any]) -> None:
    """Only that it is not far off: the benchmark measures it."""
    assert told["overhead_ratio"] > 0.5


def test_the_bundle_it_leaves_verifies(told: dict[str, Any], folder: Path) -> None:
    assert Path(told["bundle"]).resolve() == (folder / "bundle").resolve()
    done = subprocess.run(
        [sys.executable, "-m", "hedged", "verify", told["bundle"], "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    bundle = load_bundle(told["bundle"])
    found = json.loads(done.stdout)
    assert found["ok"] is True and found["identity"] == bundle.identity
    assert (bundle.manifest.name, bundle.manifest.classes is not None) == ("magika", True)
    assert bundle.manifest.splits.by is None or bundle.manifest.splits.items is not None
    assert Predictor(bundle).inputs[0].dtype == "int32"


def test_the_report_stands_alone(told: dict[str, Any], folder: Path) -> None:
    path = Path(told["report"])
    assert path.resolve() == (folder / "report.html").resolve()
    assert path.stat().st_size < 8 << 20
    page = read(path.read_text())
    assert not [url for url in page.loads() if re.match(r"(https?:)?//", url.strip())]
    assert "magika" in page.text
    assert len(page.scripts) > 0


def test_nothing_is_left_running(told: dict[str, Any], folder: Path) -> None:
    """The server and its workers, which carry the demo's folder in their environment, are gone."""
    assert told["bundle"]
    left = []
    for process in psutil.process_iter():
        try:
            if any(str(folder.resolve()) in value for value in process.environ().values()):
                left.append(process.cmdline())
        except psutil.Error:
            continue
    assert left == []
