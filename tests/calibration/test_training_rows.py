"""Curvature from the rows that the network was trained on: which rows then do what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from calibration import fit as fitting
from calibration.fit_options import FitOptions
from calibration.material import Columns
from posthoc import registry
from posthoc.contract import Features, FitError, State
from posthoc.rows import Rows, of
from tests.calibration.heads import linear, rows
from tests.factory import CLASSES, COLUMNS, data, frozen_model


def fit(name: str, task: Any, given: Features, train: Features | None, **settings: Any) -> State:
    own = None if train is None else of(train)
    return registry.fit(name, linear(4), task, of(given), settings, own)


def spread(name: str, state: State, at: Features) -> np.ndarray:
    return registry.page(name).spread(state, at.phi, at.z).variance


@pytest.mark.parametrize("name", ["laplace", "laplace_diag", "laplace_full"])
def test_a_classifiers_posterior_is_that_of_the_training_rows(name: str) -> None:
    train, given = (rows(linear(4), "classification", n, seed) for n, seed in ((700, 1), (200, 2)))
    got = fit(name, "classification", given, train)
    want = fit(name, "classification", train, None)
    np.testing.assert_allclose(spread(name, got, given), spread(name, want, given), rtol=1e-9)
    assert got.settings["training_rows"] == 700


def test_held_out_choices_are_judged_by_all_given_rows() -> None:
    train, given = (rows(linear(4), "classification", n, seed) for n, seed in ((700, 1), (200, 2)))
    got = fit("laplace", "classification", given, train, prior="heldout")
    page, settings = registry.page("laplace"), registry.settings("laplace", {"prior": "heldout"})
    stats = page.update(page.init(linear(4), "classification", settings), train)
    want = page.finish(stats, linear(4), settings, given)
    assert got.settings["prior_precision"] == want.settings["prior_precision"]


@pytest.mark.parametrize("name", ["laplace", "laplace_diag"])
def test_a_regressions_noise_is_never_that_of_the_training_rows(name: str) -> None:
    """The network knows its training rows by heart: their errors are a tenth of the others'."""
    head = linear(2)
    train, given = rows(head, "regression", 3000, 1), rows(head, "regression", 500, 2)
    known = Features(train.phi, train.z, train.z + 0.1 * (train.y - train.z))
    state = registry.fit(name, head, "regression", of(given), {}, of(known))
    want = ((given.y - given.z.astype(np.float64)) ** 2).mean(0)
    np.testing.assert_allclose(state.settings["noise_variance"], want, rtol=1e-9)
    alone = registry.fit(name, head, "regression", of(given), {})
    assert (spread(name, state, given) < 0.5 * spread(name, alone, given)).all()


def test_labels_of_training_rows_are_never_asked_for() -> None:
    train, given = (rows(linear(4), "classification", 300, seed) for seed in (1, 2))
    blind = Features(train.phi, train.z)
    a, b = (fit("laplace", "classification", given, t) for t in (train, blind))
    np.testing.assert_array_equal(a.tensors["shrink"], b.tensors["shrink"])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vbll", {}, "learns more than a curvature"),
        ("icla", {}, "learns more than a curvature"),
        ("laplace", {"fisher": "empirical"}, "not used"),
        ("laplace", {"train_rows": 5}, "say the same twice"),
    ],
)
def test_what_makes_no_sense(name: str, settings: dict[str, Any], message: str) -> None:
    train, given = (rows(linear(4), "classification", 100, seed) for seed in (1, 2))
    with pytest.raises(FitError, match=message):
        fit(name, "classification", given, train, **settings)
    with pytest.raises(FitError, match="no rows"):
        empty = Rows(lambda: iter(()), 0)
        registry.fit("laplace", linear(4), "classification", of(given), {}, empty)


def test_through_a_fit(tmp_path: Path) -> None:
    """The cache of the training rows, the manifest, and rows that are in both tables."""
    model = frozen_model(tmp_path / "model.onnx")
    table = pq.read_table(data(tmp_path / "all.parquet", n=2600))
    pq.write_table(table.slice(0, 1500), tmp_path / "data.parquet")
    pq.write_table(table.slice(1400).drop_columns(["target", "id"]), tmp_path / "train.parquet")
    options = FitOptions(task="classification")
    how = {
        "columns": Columns(
            target="target", classes=CLASSES, inputs={"x": COLUMNS["classification"]}, id="id"
        ),
        "cache_dir": tmp_path / "cache",
        "train_data": tmp_path / "train.parquet",
    }
    bundle = fitting.fit(model, tmp_path / "data.parquet", tmp_path / "bundle", options, **how)
    manifest = bundle.manifest
    assert manifest.module.settings["training_rows"] == 1200
    assert manifest.data["rows_among_training_rows"] == 100
    assert any("100 rows of the data are among the training rows" in n for n in manifest.notes)
    none = FitOptions(task="classification", method="none")
    with pytest.raises(FitError, match="--train-data is for a module"):
        fitting.fit(model, tmp_path / "data.parquet", tmp_path / "other", none, **how)
