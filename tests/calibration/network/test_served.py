"""Network-level modules through a whole fit: what is served is the copies of the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from calibration.bundle import PREDICTOR, STATE, sha256
from calibration.predictor import Predictor
from posthoc.contract import FitError
from posthoc.links import softmax
from posthoc.model.probe import with_outputs
from posthoc.runtime import open_session
from tests.calibration.network.nets import MEMBERS, fit, network_of


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


def test_a_sampled_graph_keeps_little_memory(folder: Path) -> None:
    """The plan of memory lays S samples of everything side by side."""
    sampled = fit(folder, "table", "mc_dropout", "frugal", settings={"samples": 4})
    plain = fit(folder, "table", "laplace", "planned")
    assert not sampled.session.get_session_options().enable_mem_pattern
    assert plain.session.get_session_options().enable_mem_pattern
