"""The rows, options and commands of network-level modules."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from calibration import fit as fitting
from calibration import network
from calibration.bundle import PREDICTOR, load_bundle
from calibration.fit_options import FitOptions
from calibration.material import DEFAULT_SPLIT, Columns
from calibration.predictor import Predictor
from hedged import cli
from posthoc.contract import DataError, FitError, ModelError
from posthoc.data import split_roles, to_rows
from posthoc.export import export_torch
from posthoc.frozen import Frozen, open_frozen
from posthoc.model.samples import Samples
from posthoc.network.attach import NetworkRows
from tests.calibration.network.nets import MODULE, fit, network_of


@pytest.fixture(scope="module")
def table() -> Frozen:
    made = export_torch(network_of("table"), {"input": torch.zeros(2, 5)})
    return open_frozen(made.model, task="classification")


def rows_of(model: Frozen, data: Path, limit: int, seed: int = 0) -> NetworkRows:
    samples = Samples(data, "y")
    return network.module_rows(model, samples, limit, "classification", None, DEFAULT_SPLIT, seed)


def test_rows_are_module_rows_whatever_the_order_of_the_table(
    folder: Path, table: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with np.load(folder / "table.npz") as data:
        x, y = data["input"], data["y"].astype(np.int64)
    x[7, 2] = np.nan  # a faulty row
    order = np.argsort(y, kind="stable")  # by class, as folders of images are
    paths = []
    for name, index in (("sorted", order), ("mixed", np.random.default_rng(0).permutation(900))):
        rows = pa.table({"input": pa.array(list(x[index])), "y": y[index]})
        pq.write_table(rows, tmp_path / f"{name}.parquet")
        paths.append(tmp_path / f"{name}.parquet")
    whole, samples = rows_of(table, paths[1], 10_000), Samples(paths[1], "y")
    read = to_rows(
        next(samples.table.batches(900, ["input", "y"])),
        samples.mapping(table.inputs),
        table.inputs,
        task="classification",
        n_classes=3,
    )
    wanted = split_roles(read.split_keys, DEFAULT_SPLIT, 0) == 0
    wanted[list(read.bad)] = False
    assert len(read.bad) == 1 and len(whole) == wanted.sum()
    np.testing.assert_array_equal(
        np.sort(whole.inputs["input"][:, 0]), np.sort(read.inputs["input"][wanted][:, 0])
    )
    some = [rows_of(table, path, 60) for path in paths]
    for rows in some:
        assert len(rows) == 60
        assert np.abs(np.bincount(rows.y) / 60 - np.bincount(whole.y) / len(whole)).max() < 0.2
    np.testing.assert_array_equal(some[0].inputs["input"], some[1].inputs["input"])
    np.testing.assert_array_equal(some[0].y, some[1].y)
    np.testing.assert_array_equal(some[0].inputs["input"], whole.inputs["input"][:60])
    assert not np.array_equal(rows_of(table, paths[0], 60, 1).y, some[0].y)
    monkeypatch.setattr(network, "_BYTES", 20 * 35)  # rows take 20 bytes
    assert len(rows_of(table, paths[0], 60)) == 35
    monkeypatch.setattr(network, "_READ", 16)  # many batches, pruned again and again
    for path in paths:
        few = rows_of(table, path, 60)
        np.testing.assert_array_equal(few.inputs["input"], whole.inputs["input"][:35])


def test_rows_that_are_not_there(table: Frozen, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", input=np.full((30, 5), np.nan, "f4"), y=np.zeros(30, np.int64))
    with pytest.raises(FitError, match="no module rows to sample the network on"):
        rows_of(table, tmp_path / "bad.npz", 10)
    np.savez(tmp_path / "none.npz", input=np.zeros((30, 5), "f4"))
    with pytest.raises(DataError, match="--target"):
        network.module_rows(
            table, Samples(tmp_path / "none.npz"), 10, "classification", None, DEFAULT_SPLIT, 0
        )


# Options, and the command line


def test_what_goes_together_is_checked_before_a_row_is_read(folder: Path) -> None:
    def refused(words: str, **options: Any) -> None:
        with pytest.raises(FitError, match=words):
            fitting.fit("no:net", folder / "no.npz", folder / "no", FitOptions(**options))

    refused("'abnn' is not a module for regression", task="regression", method="abnn")
    for settings, words in (({"sample": 3}, "no setting 'sample'"), ({"rate": 2}, "less than 1")):
        refused(words, task="classification", method="mc_dropout", settings=settings)
    columns = Columns(target="y", classes=("a", "b", "c", "d"))
    options = FitOptions(task="classification", method="abnn")
    with pytest.raises(DataError, match="names 4 classes and the model has 3 outputs"):
        fitting.fit(f"{MODULE}:table", folder / "table.npz", "no", options, columns=columns)
    refused(
        "keeps the frozen model's answer",
        task="regression",
        method="mc_dropout",
        prediction="module",
    )


def test_what_the_export_has_to_keep() -> None:
    def kept(method: str, **settings: Any) -> Any:
        options = FitOptions(task="classification", method=method, settings=settings)
        return network.kept(options), network.at_network(method)

    assert kept("mc_dropout") == ("dropout", True)
    assert kept("mc_dropout", at="a,b") == (None, True)
    assert kept("mc_batch_norm") == kept("abnn") == ("normalisation", True)
    assert kept("laplace") == kept("none") == (None, False)


def hedged(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["hedged", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def test_the_command_line(
    folder: Path,
    dropout: Predictor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ("--data", "table.npz", "--task", "classification", "--target", "y")
    common += ("--checkpoint", "table.safetensors", "--cache", "cache", "--ood", "none")
    common += ("--method", "mc_dropout", "--set", "samples=8")
    assert hedged(monkeypatch, "fit", f"{MODULE}:table", *common, "-o", "typed") == 0
    capsys.readouterr()
    typed = load_bundle(folder / "typed").files[PREDICTOR]
    assert typed == dropout.bundle.files[PREDICTOR]
    # Tensors by name; who does not know them is told.
    code = hedged(monkeypatch, "fit", f"{MODULE}:table", *common, "--set", "at=tanh,tan", "-o", "n")
    said = " ".join(capsys.readouterr().err.split())
    assert code != 0 and "no tensor 'tan'" in said and "'tanh'" in said and "'tanh_1'" in said
    arguments = (*common, "--set", "at=tanh, tanh_1", "--set", "epsilon=0.05", "-o", "named")
    assert hedged(monkeypatch, "fit", f"{MODULE}:table", *arguments) == 0
    noted = load_bundle(folder / "named").manifest.module.settings
    assert noted["epsilon"] == 0.05 and noted["uncalibrated"] is True and noted["copies"] == 8
    assert len(noted["sites"]) == 2 and len(set(noted["rates"])) == 1
    assert 0.02 < max(noted["total_variation"], noted["flips"]) <= 0.05
    capsys.readouterr()
    assert hedged(monkeypatch, "modules", "mc_dropout") == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "at = ",
        "samples = 20",
        "rate = found by the fit",
        "epsilon = 0.01",
        "1506.02142",
    ):
        assert words in text
    assert "keeps the frozen label, unless its own is asked for" in text


def test_a_torch_network_without_dropout(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"values: the module has no dropout"):
        fit(folder, "values", "mc_dropout", "no")
    predictor = fit(folder, "values", "mc_dropout", "at", settings={"at": "tanh", "epsilon": 0.1})
    noted = predictor.manifest.module.settings
    assert 0.08 < noted["relative_std"] <= 0.1
