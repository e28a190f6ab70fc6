"""Networks with dropout and normalisations: what they are, that they learn and come out the same,
and what the benchmarks over them do with graphs and probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from bench import abnn, dropout, normed
from bench.normed import KINDS, Kind, Normed, Recipe
from posthoc.export import export_torch
from posthoc.network.sites import find_dropouts, find_normalisations
from posthoc.runtime import open_session

NORMS = {
    "batch": nn.BatchNorm2d,
    "layer": nn.LayerNorm,
    "group": nn.GroupNorm,
    "instance": nn.InstanceNorm2d,
    "rms": nn.RMSNorm,
}


def untrained(kind: Kind, seed: int = 0) -> Normed:
    torch.manual_seed(seed)
    return Normed(kind).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_its_normalisation_and_dropout(kind: Kind) -> None:
    net = untrained(kind)
    found = {k for k, t in NORMS.items() for m in net.modules() if type(m) is t}
    assert found == {kind}
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.2] * 4
    assert 200_000 < sum(p.numel() for p in net.parameters()) < 320_000
    x = torch.rand(3, 1, 28, 28)
    z = net(x)
    assert z.shape == (3, 10)
    assert torch.equal(z, net(x))
    assert not torch.equal(z, net.train()(x))


def test_a_normalisation_of_channels_sees_each_pixel_alone() -> None:
    x = torch.randn(2, 6, 5, 4)
    for kind, whole in (("layer", nn.LayerNorm(6)), ("rms", nn.RMSNorm(6))):
        y = normed.normalisation(kind, 6)(x)  # type: ignore[arg-type]
        assert torch.allclose(y[1, :, 3, 2], whole(x[1, :, 3, 2]), atol=1e-6)


def test_it_learns_real_images_and_comes_out_the_same_without_a_trace() -> None:
    images, labels = normed.rows("train")
    recipe = Recipe(epochs=1, rows=1_280, batch=32, rate=0.02)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    first = normed.train("batch", images, labels, recipe)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    x, y = normed.rows("test")
    assert (first(normed.as_input(x[:500])).argmax(1).numpy() == y[:500]).mean() > 0.4
    short = Recipe(epochs=1, rows=128, batch=64)
    again = [normed.train("rms", images, labels, short).state_dict() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in again), strict=True))


def test_no_image_is_in_two_parts() -> None:
    (train, known), (fresh, others), (test, _) = (
        normed.rows(p) for p in ("train", "fresh", "test")
    )
    assert (len(train), len(fresh), len(test)) == (40_000, 20_000, 10_000)
    whole = {i.tobytes() for i in (*train, *fresh)}
    assert len(whole) == 60_000  # no copies, so that equal counts mean disjoint parts
    assert not whole & {i.tobytes() for i in test}
    assert np.bincount(np.concatenate([known, others])).tolist() == [6_000] * 10


def test_weights_are_kept_and_named_by_what_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = normed.rows("test")
    monkeypatch.setenv("HEDGED_ASSETS", str(tmp_path))
    monkeypatch.setattr(normed, "rows", lambda part: (images[:300], labels[:300]))
    monkeypatch.setitem(normed.RECIPES, "group", Recipe(epochs=1, rows=256))
    path = normed.weights("group")
    x = normed.as_input(images[:5])
    net = normed.fashion_group()
    assert torch.equal(net(x), normed.load("group", path)(x))
    assert not any(p.requires_grad for p in net.parameters())
    assert not net.training
    monkeypatch.setitem(normed.RECIPES, "group", Recipe(epochs=1, rows=256, seed=1))
    assert normed.weights("group") != path
    table = pq.read_table(normed.table("test", 7))
    assert table["label"].to_pylist() == labels[:7].tolist()
    stored = np.stack([np.asarray(v, np.float32) for v in table["image"].to_pylist()])
    assert np.array_equal(stored.reshape(7, 1, 28, 28), normed.as_input(images[:7]).numpy())


def test_a_graph_cut_at_a_dropout_is_the_same_in_two_parts() -> None:
    x = torch.rand(6, 1, 28, 28)
    model = export_torch(untrained("batch"), (x,), input_names=["image"], keep="dropout").model
    (output,) = [o.name for o in onnx.load_from_string(model).graph.output]
    whole = open_session(model).run(None, {"image": x.numpy()})[0]
    sites = find_dropouts(model)
    assert [s.rate for s in sites] == pytest.approx([0.2] * 4)
    for site in sites:
        before, behind = dropout.cut(model, site.tensor, output)
        (middle,) = open_session(before).run(None, {"image": x.numpy()})
        assert np.allclose(
            open_session(behind).run(None, {site.tensor: middle})[0], whole, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["batch", "rms"])
def test_its_normalisations_survive_the_export(kind: Kind) -> None:
    x = torch.rand(6, 1, 28, 28)
    model = export_torch(untrained(kind), (x,), input_names=["image"], keep="normalisation").model
    sites = find_normalisations(model, {"image": x.numpy()})
    assert [s.kind for s in sites] == [kind] * 10
    assert sorted(s.channels for s in sites) == [16, *[32] * 3, *[64] * 3, *[128] * 3]


def test_quality_is_what_others_measure() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 3_000)
    z = 2 * np.eye(4)[y] + rng.normal(size=(3_000, 4))
    probs = {
        name: np.exp(t * z) / np.exp(t * z).sum(1, keepdims=True)
        for name, t in (("frozen", 3.0), ("abnn", 2.0))
    }
    probs["abnn"][:300] = probs["abnn"][:300, ::-1]
    found = abnn.quality(probs, y)
    for name, p in probs.items():
        line = found["table"][name]
        assert line["accuracy"] == pytest.approx(accuracy_score(y, p.argmax(1)))
        assert line["nll"] == pytest.approx(log_loss(y, p), rel=1e-6)
    change = found["accuracy_difference"]
    assert change["value"] == pytest.approx(found["accuracy_abnn"] - found["accuracy_frozen"])
    assert change["low"] < change["value"] < change["high"] < 0
    assert np.allclose(abnn.tempered(probs["frozen"], 1.5), probs_at(z, 2.0), atol=1e-9)


def probs_at(z: np.ndarray, sharpness: float) -> np.ndarray:
    p = np.exp(sharpness * z)
    return np.asarray(p / p.sum(1, keepdims=True))
