"""Shared fits; and pages are looked at only where a browser is installed (Debian: chromium)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.bundle import Bundle
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns, Material, prepare
from tests import factory
from tests.calibration import networks
from tests.calibration.networks import network, table

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
collect_ignore = [] if BROWSER else ["test_report_browser.py"]


SEEDS = range(20)
NAMES = factory.CLASSES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fit")


@pytest.fixture(scope="module")
def pool(folder: Path) -> Material:
    """A ten-class network with 6,000 cached rows."""
    model = network(folder / "ten.onnx", out=10)
    return networks.material(model, table(model, 6000))


@pytest.fixture(scope="module")
def values(folder: Path) -> Material:
    """The regression network of the factory with 4,000 cached rows."""
    model = factory.frozen_model(folder / "values.onnx", "regression")
    return prepare(
        model,
        factory.data(folder / "values.parquet", "regression"),
        options=FitOptions(task="regression"),
        columns=Columns(target="target", inputs={"x": factory.COLUMNS["regression"]}),
        cache_dir=folder / "cache",
    )


Fit = Callable[..., Bundle]


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Fit:
    """The fit of a model on a table, with options as keywords."""

    def run(model: Path, data: Path, columns: Columns | None = None, **options: Any) -> Bundle:
        asked = FitOptions(**{"task": "classification", **options})
        columns = columns or networks.columns(model)
        out = tmp_path / "bundle"
        return fit(model, data, out, asked, columns=columns, cache_dir=folder / "cache")

    return run
