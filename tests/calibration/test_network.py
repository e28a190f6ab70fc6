"""Network-level modules through a whole fit: what is served is the copies of the network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from calibration import fit as fitting
from calibration import network
from calibration.bundle import PREDICTOR, STATE, load_bundle, sha256
from calibration.fit_options import FitOptions
from calibration.material import DEFAULT_SPLIT, Columns
from calibration.predictor import Predictor
from hedged import cli
from posthoc.contract import DataError, FitError, ModelError
from posthoc.data import split_roles, to_rows
from posthoc.export import export_torch
from posthoc.frozen import Frozen, open_frozen
from posthoc.links import softmax
from posthoc.model.probe import with_outputs
from posthoc.model.samples import Samples
from posthoc.network.attach import NetworkRows
from posthoc.runtime import open_session

MODULE = "nets_of_network_tests"
NETS = """
from torch import nn

def table():
    return nn.Sequential(
        nn.Linear(5, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(0.125),
        nn.Linear(16, 12), nn.BatchNorm1d(12, eps=1e-2), nn.Tanh(), nn.Dropout(0.25),
        nn.Linear(12, 3),
    )

def values():
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))

def maps():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1)
    )
"""
MEMBERS = "hedged/members"


def network_of(kind: str) -> Any:
    """The same weights at every call."""
    made: dict[str, Any] = {}
    exec(NETS, made)
    torch.manual_seed(0)
    net = made[kind]().eval()
    with torch.no_grad():
        for part in net:
            if isinstance(part, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                part.running_var.uniform_(0.2, 1)
                part.running_mean.uniform_(-0.3, 0.3)
        net[-1].weight.mul_(4)
    return net


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory: networks, their weights, and labelled rows."""
    path = tmp_path_factory.mktemp("networks")
    (path / f"{MODULE}.py").write_text(NETS)
    rng = np.random.default_rng(0)
    for kind, n, shape in (("table", 900, (5,)), ("values", 500, (5,)), ("maps", 320, (1, 6, 6))):
        net, x = network_of(kind), rng.normal(size=(n, *shape)).astype(np.float32)
        save_file(net.state_dict(), path / f"{kind}.safetensors")
        with torch.no_grad():
            z = net(torch.as_tensor(x)).numpy()
            if kind == "table":  # labels that the mixture explains better than the network
                for part in net:
                    part.train(isinstance(part, torch.nn.Dropout))
                many = [softmax(net(torch.as_tensor(x)).numpy()) for _ in range(64)]
                z = np.log(np.mean(many, axis=0))
        y = (z + rng.gumbel(size=z.shape)).argmax(1)
        if kind == "values":
            y = (z + rng.normal(size=z.shape)).astype(np.float32)
        if kind == "maps":
            y[rng.random(y.shape) < 0.2] = -1
            y[5] = -1  # nothing of this image is known
        np.savez(path / f"{kind}.npz", input=x, y=y)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


def fit(
    folder: Path, kind: str, method: str, out: str, cache: str = "cache", **options: Any
) -> Predictor:
    given = {"task": "regression" if kind == "values" else "classification", "ood": "none"}
    how = {"pixels": 12} if kind == "maps" else {}
    fitting.fit(
        f"{MODULE}:{kind}",
        folder / f"{kind}.npz",
        folder / out,
        FitOptions(method=method, **given | options),
        columns=Columns(target="y"),
        cache_dir=folder / cache,
        checkpoint=folder / f"{kind}.safetensors",
        **how,
    )
    predictor = Predictor(folder / out)
    predictor.self_check()
    return predictor


@pytest.fixture(scope="module")
def dropout(folder: Path) -> Predictor:
    return fit(folder, "table", "mc_dropout", "dropout", settings={"samples": 8})


def inner(predictor: Predictor, x: np.ndarray, *names: str) -> list[np.ndarray]:
    """Tensors of the fused graph, and what it serves."""
    proto = onnx.load_from_string(predictor.bundle.files[PREDICTOR])
    session = open_session(with_outputs(proto, [*names]))
    return session.run([*names], {predictor.inputs[0].name: x})


def kept_of(predictor: Predictor) -> dict[str, tuple[int, ...]]:
    """Kind and shape of what the module stored; one site."""
    stored = predictor.bundle.tensors(STATE)
    found = {k: v.shape for k, v in stored.items() if k.startswith("module/")}
    return {k.split("/")[1]: shape for k, shape in found.items()}


def served(predictor: Predictor, x: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Probabilities of a mixture of S×N×C members at the bundle's temperature and strength."""
    z = network_of("table")(torch.as_tensor(x)).detach().numpy().astype(np.float64)
    t, s = (predictor.manifest.scaling[k] for k in ("temperature", "strength"))
    apart = members - z
    return softmax(z / t + np.sqrt(s) * (apart - apart.mean(2, keepdims=True)))


def test_served_probabilities_are_those_of_the_thinned_networks(dropout: Predictor) -> None:
    manifest, net = dropout.manifest, network_of("table")
    settings = manifest.module.settings
    assert settings["rates"] == pytest.approx([0.125, 0.25])
    assert (settings["samples"], settings["copies"], settings["seed"]) == (8, 8, 0)
    assert manifest.prediction == "frozen" and manifest.scaling["strength"] > 0
    assert len(manifest.frozen_outputs) == 1  # the copies are nobody's business
    assert any("8 fixed dropout masks" in n for n in manifest.notes)
    x = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
    proto = onnx.load_from_string(dropout.bundle.files[PREDICTOR])
    assert not [n for n in proto.graph.node if n.op_type.startswith(("Random", "Bernoulli"))]
    [phi] = inner(dropout, x, MEMBERS)
    members = phi.reshape(40, 8, 3).swapaxes(0, 1)
    # The masks are in the graph; a copy of the network with each gives its member.
    masks = [
        m
        for t in proto.graph.initializer
        if (m := onnx.numpy_helper.to_array(t).copy()).shape[:2] == (8, 1) and (m == 0).any()
    ]
    assert [m.shape[2] for m in masks] == [16, 12]
    for s in range(8):
        with torch.no_grad():
            h = net[:4](torch.as_tensor(x)) * torch.as_tensor(masks[0][s, 0])
            z = net[8](net[4:8](h) * torch.as_tensor(masks[1][s, 0]))
        np.testing.assert_allclose(members[s], z.numpy(), atol=1e-4)
    out = dropout.predict({"input": x})
    each = served(dropout, x, members)
    p = each.mean(0)
    np.testing.assert_allclose(out.probs, p, atol=1e-5)
    frozen = net(torch.as_tensor(x)).argmax(1).numpy()
    np.testing.assert_array_equal(out.label, frozen)
    np.testing.assert_allclose(out.confidence, p[np.arange(40), frozen], atol=1e-5)
    own = -(each * np.log(each)).sum(2).mean(0)
    np.testing.assert_allclose(out.aleatoric, own, atol=1e-4)
    np.testing.assert_allclose(out.epistemic, -(p * np.log(p)).sum(1) - own, atol=1e-4)


def test_asked_for_the_mixtures_own_label_is_served(folder: Path, dropout: Predictor) -> None:
    options = {"settings": {"samples": 8}, "prediction": "module"}
    module = fit(folder, "table", "mc_dropout", "module", **options)
    x = np.random.default_rng(2).normal(size=(2000, 5)).astype(np.float32)
    out, frozen = module.predict({"input": x}), dropout.predict({"input": x})
    np.testing.assert_array_equal(out.label, out.probs.argmax(1))
    assert (out.label != frozen.label).any()
    np.testing.assert_allclose(out.confidence, out.probs.max(1))
    assert "not of the frozen model" in " ".join(module.manifest.notes)


def test_the_seed_of_the_masks_and_the_cache(folder: Path, dropout: Predictor) -> None:
    def sha(predictor: Predictor) -> str:
        return sha256(predictor.bundle.files[PREDICTOR])

    before = len(list((folder / "cache").iterdir()))
    again = fit(folder, "table", "mc_dropout", "again", "elsewhere", settings={"samples": 8})
    assert sha(again) == sha(dropout)
    other = fit(folder, "table", "mc_dropout", "other", settings={"samples": 8, "seed": 1})
    assert sha(other) != sha(dropout)
    # Other masks, other features: nothing of the first cache was read.
    assert len(list((folder / "cache").iterdir())) == before + 1
    x = np.random.default_rng(3).normal(size=(30, 5)).astype(np.float32)
    a, b, c = (p.run({"input": x}) for p in (dropout, again, other))
    assert all(a[k].tobytes() == b[k].tobytes() for k in a)
    assert np.abs(a["probs"] - c["probs"]).max() > 1e-4


def test_a_regression_keeps_the_frozen_mean(folder: Path) -> None:
    predictor = fit(
        folder, "values", "mc_batch_norm", "values", settings={"samples": 5, "batch": 20}
    )
    x = np.random.default_rng(4).normal(size=(30, 5)).astype(np.float32)
    out = predictor.predict({"input": x})
    z = network_of("values")(torch.as_tensor(x)).detach().numpy()
    np.testing.assert_allclose(out.mean, z, atol=1e-5)
    [phi] = inner(predictor, x, MEMBERS)
    variance = ((phi.reshape(30, 5, 2) - z[:, None]) ** 2).mean(1)
    scaling, noise = predictor.manifest.scaling, predictor.manifest.module.settings
    epistemic = scaling["temperature"] ** 2 * scaling["strength"] * variance
    np.testing.assert_allclose(out.epistemic_std**2, epistemic, rtol=1e-3, atol=1e-7)
    aleatoric = scaling["temperature"] ** 2 * np.asarray(noise["noise_variance"])
    np.testing.assert_allclose(out.std**2, epistemic + aleatoric, rtol=1e-4)
    assert kept_of(predictor) == {"gain": (5, 16), "offset": (5, 16)}
    assert noise["batch"] == 20 and noise["sites"] == 1 and noise["seed"] == 0
    with pytest.raises(FitError, match="keeps the frozen model's answer; leave --prediction"):
        fit(folder, "values", "mc_batch_norm", "no", prediction="module")


def test_abnn_without_noise_and_training_serves_the_frozen_network(folder: Path) -> None:
    settings = {"alpha": 0, "epochs": 0, "members": 2, "samples": 2}
    predictor = fit(folder, "table", "abnn", "still", settings=settings)
    x = np.random.default_rng(5).normal(size=(25, 5)).astype(np.float32)
    own = predictor.manifest.frozen_outputs[0].name
    z, logits, phi = inner(predictor, x, own, "uq_logits", MEMBERS)
    assert z.tobytes() == logits.tobytes()
    for copy in phi.reshape(25, 4, 3).swapaxes(0, 1):
        np.testing.assert_allclose(copy, z, atol=1e-5 * np.abs(z).max())
    out = predictor.predict({"input": x})
    np.testing.assert_allclose(
        out.probs, softmax(z / predictor.manifest.scaling["temperature"]), atol=1e-5
    )
    np.testing.assert_allclose(out.epistemic, 0, atol=1e-5)
    noted = predictor.manifest.module.settings
    assert (noted["members"], noted["samples"], noted["copies"]) == (2, 2, 4)
    assert noted["kept"] == 2 and noted["judges"] < 3200
    assert any("it takes 3,200" in n for n in predictor.manifest.notes)


def test_a_segmentation_with_ignored_pixels(folder: Path) -> None:
    settings = {"members": 2, "samples": 2, "epochs": 2, "batch": 32, "alpha": 0.02}
    predictor = fit(folder, "maps", "abnn", "maps", settings=settings, alphas=(0.2,))
    x = np.random.default_rng(6).normal(size=(4, 1, 6, 6)).astype(np.float32)
    out = predictor.predict({"input": x})
    assert out.probs.shape == (4, 3, 6, 6) and out.label.shape == (4, 6, 6)
    z = network_of("maps")(torch.as_tensor(x)).detach().numpy()
    np.testing.assert_array_equal(out.label, z.argmax(1))
    noted = predictor.manifest.module.settings
    [phi] = inner(predictor, x, MEMBERS)
    members = phi.reshape(4, noted["copies"], 3, 6, 6)
    t, s = (predictor.manifest.scaling[k] for k in ("temperature", "strength"))
    apart = members - z[:, None]
    each = z[:, None] / t + np.sqrt(s) * (apart - apart.mean(2, keepdims=True))
    p = softmax(np.moveaxis(each, 2, -1)).mean(1)
    np.testing.assert_allclose(np.moveaxis(out.probs, 1, -1), p, atol=1e-4)
    assert noted["kept"] >= 1 and noted["copies"] == 2 * noted["kept"]
    # Deltas of one normalisation: nothing else moved.
    assert kept_of(predictor) == {"scale": (noted["kept"], 6), "shift": (noted["kept"], 6)}


# Rows


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
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--data", "table.npz", "--task", "classification", "--target", "y")
    common += ("--checkpoint", "table.safetensors", "--cache", "cache", "--ood", "none")
    common += ("--method", "mc_dropout", "--set", "samples=8")
    assert hedged(monkeypatch, "fit", f"{MODULE}:table", *common, "-o", "typed") == 0
    capsys.readouterr()
    typed = load_bundle(folder / "typed").files[PREDICTOR]
    assert typed == load_bundle(folder / "dropout").files[PREDICTOR]
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


def test_a_sampled_graph_keeps_little_memory(folder: Path) -> None:
    """The plan of memory lays S samples of everything side by side."""
    sampled = fit(folder, "table", "mc_dropout", "frugal", settings={"samples": 4})
    plain = fit(folder, "table", "laplace", "planned")
    assert not sampled.session.get_session_options().enable_mem_pattern
    assert plain.session.get_session_options().enable_mem_pattern
