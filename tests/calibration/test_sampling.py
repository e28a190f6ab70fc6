"""Whole-network posteriors through a fit: served probabilities are those of the sampled copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from calibration import fit as fitting
from calibration.evaluate import evaluate
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.predictor import Predictor
from calibration.sampling import Sampling
from posthoc.contract import FitError, ModelError

FACTORY = """
from torch import nn

def make(outputs={outputs}):
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, outputs))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, name: str, outputs: int, x: np.ndarray, y: np.ndarray) -> str:
    """A small network trained on the first 200 rows; the others are the data."""
    (folder / f"{name}.py").write_text(FACTORY.format(outputs=outputs))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, outputs))
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    loss = nn.functional.cross_entropy if y.ndim == 1 else nn.functional.mse_loss
    for _ in range(150):
        optimizer.zero_grad()
        loss(net(torch.as_tensor(x[:200])), torch.as_tensor(y[:200])).backward()
        optimizer.step()
    save_file(net.state_dict(), folder / "net.safetensors")
    np.savez(folder / "rows.npz", x=x[200:], y=y[200:])
    return f"{name}:make"


def fit(model: str, folder: Path, task: Any, **options: Any) -> Predictor:
    fitting.fit(
        model,
        folder / "rows.npz",
        folder / "bundle",
        FitOptions(task=task, method="weights", prediction="module", ood="none", **options),
        columns=Columns(target="y"),
        cache_dir=folder / "cache",
        checkpoint=folder / "net.safetensors",
        sampling=Sampling(weights="all", samples=4, curvature="diag"),
    )
    predictor = Predictor(folder / "bundle")
    predictor.self_check()
    return predictor


def test_a_classifier(folder: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1100, 5)).astype(np.float32)
    y = (np.tanh(x) @ rng.normal(size=(5, 3)) * 2 + rng.gumbel(size=(1100, 3))).argmax(1)
    predictor = fit(write(folder, "sampled_classifier", 3, x, y), folder, "classification")
    manifest = predictor.manifest
    assert manifest.module.settings["samples"] == 4
    assert manifest.prediction == "module"
    assert len(manifest.frozen_outputs) == 1  # the copies are nobody's business
    linearised = manifest.evaluation["linearised"]
    assert linearised["rows"] > 100 and linearised["nll"] < np.log(3)
    hedged, frozen = (manifest.evaluation[k]["nll"] for k in ("hedged", "frozen"))
    assert hedged < frozen
    out = predictor.predict({manifest.inputs[0].name: x[:20]})
    assert out.epistemic is not None and (out.epistemic > 0).any()
    np.savez(folder / "fresh.npz", x=x[:400] + np.float32(1e-3), y=y[:400])
    about = evaluate(predictor, folder / "fresh.npz").about
    assert f"{linearised['nll']:.4f} nats" in about["linearised predictive of laplace-torch"]


def test_a_regressor(folder: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1100, 5)).astype(np.float32)
    y = (np.tanh(x) @ rng.normal(size=(5, 2)) + 0.3 * rng.normal(size=(1100, 2))).astype("f4")
    predictor = fit(write(folder, "sampled_regressor", 2, x, y), folder, "regression")
    out = predictor.predict({predictor.manifest.inputs[0].name: x[:20]})
    assert out.mean.shape == out.epistemic_std.shape == (20, 2)
    levels = predictor.manifest.evaluation["levels"]
    assert 0.8 < levels["0.9"]["coverage"] <= 1


def test_what_does_not_go_together(folder: Path) -> None:
    options = FitOptions(task="classification", method="laplace")
    with pytest.raises(FitError, match="go together"):
        fitting.fit("m:f", "rows.npz", folder / "b", options, sampling=Sampling(weights="all"))
    x = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    model = write(folder, "sampled_limit", 3, x, np.arange(400) % 3)
    with pytest.raises(ModelError, match="above the limit"):
        fitting.fit(
            model,
            folder / "rows.npz",
            folder / "b",
            FitOptions(task="classification", method="weights", prediction="module"),
            columns=Columns(target="y"),
            cache_dir=folder / "cache",
            checkpoint=folder / "net.safetensors",
            sampling=Sampling(weights="all", samples=2_000_000),
        )
