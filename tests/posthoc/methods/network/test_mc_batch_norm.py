"""MC-batch-norm against torch in training mode on the same mini-batches."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from posthoc import registry
from posthoc.contract import FitError, ModelError
from posthoc.frozen import open_frozen
from posthoc.network.attach import NetworkRows
from tests.posthoc.methods.network import nets

BATCHED = (nn.BatchNorm1d, nn.BatchNorm2d)


def on_batch(net: Any, batch: np.ndarray) -> Any:
    """A copy of a network whose running statistics are those that its normalisations, in training
    mode, have on one batch; its dropouts stay off."""
    net = copy.deepcopy(net)
    counts = {}
    for part in nets.parts(net, BATCHED):
        part.train()
        part.momentum = 1.0
        part.register_forward_hook(
            lambda m, args, _: counts.__setitem__(m, args[0].numel() // args[0].shape[1])
        )
    nets.run(net, {"x": batch})
    for part, n in counts.items():
        part.eval()
        part.running_var.mul_((n - 1) / n)  # it keeps the unbiased one, and normalises by the other
    return net


def batches(given: NetworkRows, seed: int, samples: int, batch: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    x = given.inputs["x"]
    return [x[rng.choice(len(x), batch, replace=False)] for _ in range(samples)]


@pytest.mark.parametrize("kind", ["images", "table", "single", "values", "maps", "norms"])
def test_copies_are_the_network_in_training_mode_on_a_mini_batch(kind: str) -> None:
    task = "regression" if kind == "values" else "classification"
    given = nets.rows(kind, 40)
    model = nets.frozen(kind, "normalisation")
    made = nets.attach("mc_batch_norm", model, given, task, samples=5, batch=12, seed=3)
    x = nets.inputs(kind, 6, seed=2)
    drawn = batches(given, 3, 5, 12)
    want = np.stack([nets.run(on_batch(nets.network(kind), b), x) for b in drawn])
    got = made.members(x)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())
    frozen, _ = nets.both(made.frozen, x)
    assert np.median(np.abs(want - frozen)) > 1e-2  # it is not the frozen network
    np.testing.assert_allclose(frozen, nets.run(nets.network(kind), x), atol=1e-4)
    norms = nets.parts(nets.network(kind), BATCHED)
    assert made.attached.facts == {"sites": len(norms), "samples": 5, "batch": 12, "seed": 3}
    assert {v.shape for v in made.attached.tensors.values()} == {(5, n.num_features) for n in norms}
    # The graph holds what is stored, and nothing random.
    for tensor, noise in made.noises.items():
        gain, offset = (made.attached.tensors[f"{k}/{tensor}"] for k in ("gain", "offset"))
        np.testing.assert_array_equal(noise.terms()["gain"].reshape(gain.shape), gain.astype("f4"))
        np.testing.assert_array_equal(
            noise.terms()["offset"].reshape(gain.shape), offset.astype("f4")
        )


def test_a_channel_without_scale_stays() -> None:
    net = copy.deepcopy(nets.network("images"))
    with torch.no_grad():
        net.batch.weight[2] = 0.0
        net.inner.weight[[0, 5]] = 0.0
    given = NetworkRows(nets.inputs("images", 30), None)  # labels are of no use
    tensors = {"x": torch.as_tensor(given.inputs["x"][:8])}
    exported = nets.export_torch(net, tensors, rows=tensors, keep="normalisation").model
    model = open_frozen(exported, task="classification", sample=given.inputs)
    made = nets.attach("mc_batch_norm", model, given, samples=3, batch=10)
    x = nets.inputs("images", 5, seed=4)
    want = [nets.run(on_batch(net, b), x) for b in batches(given, 0, 3, 10)]
    np.testing.assert_allclose(made.members(x), want, atol=1e-4)
    first, second = (v for k, v in made.attached.tensors.items() if k.startswith("gain/"))
    assert (first[:, 2] == 1).all() and (second[:, [0, 5]] == 1).all()


def test_the_seed_makes_the_batches() -> None:
    model, given = nets.frozen("table", "normalisation"), nets.rows("table", 60)

    def made(**settings: Any) -> bytes:
        return nets.attach("mc_batch_norm", model, given, samples=3, **settings).frozen.model

    assert made() == made(seed=0) != made(seed=1)


def test_what_cannot_be_done_is_said() -> None:
    given = nets.rows("images", 40)
    with pytest.raises(FitError, match="at least 41 module rows and has 40"):
        nets.attach("mc_batch_norm", nets.frozen("images", "normalisation"), given, batch=41)
    with pytest.raises(
        ModelError, match=r"fold BatchNorm.*module:factory.*optimize=False.*PRESERVE"
    ):
        nets.attach("mc_batch_norm", nets.frozen("images", None), given)
    layers = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.as_tensor(nets.inputs("table", 8)["x"])
    exported = nets.export_torch(layers, {"input": x}, rows={"input": x}, keep="normalisation")
    model = open_frozen(exported.model, task="classification")
    rows = NetworkRows({"input": nets.inputs("table", 40)["x"]}, None)
    with pytest.raises(ModelError, match=r"has layer normalisation.*abnn works"):
        nets.attach("mc_batch_norm", model, rows)
    for name, value in (("samples", 1), ("batch", 1), ("seed", -1)):
        with pytest.raises(FitError, match=f"setting {name}: .* greater than or equal"):
            registry.settings("mc_batch_norm", {name: value})
