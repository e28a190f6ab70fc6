"""The table of maps on small material, the peers against their definitions, and its page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from scipy.stats import pearsonr
from torch import Tensor, nn

from bench import bayescap, dense, dense_peers, table
from bench import dense_networks as networks
from bench.dense_material import DenseSet
from calibration.material import ROLES, split
from posthoc.export import export_torch
from posthoc.methods.bayescap.image import Settings

SIDE, PER_PHOTO = 16, 2


class Sharpen(nn.Module):
    """The image and a little more on the scale 0–1; its last layer sees nine pixels, so that it
    has no head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()),
            nn.Conv2d(6, 3, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        shown = x / 255
        sharper: Tensor = shown + 0.1 * self.body(shown)
        return sharper


class Reddest(nn.Module):
    """A logit for each of three classes: which colour is brightest."""

    def __init__(self) -> None:
        super().__init__()
        self.blur = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.head = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.blur.weight.fill_(1 / 9 / 20)
            self.head.weight.copy_(torch.eye(3)[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.blur(x)))
        return logits


def sharpen() -> nn.Module:
    torch.manual_seed(0)
    return Sharpen().eval().requires_grad_(False)


def reddest() -> nn.Module:
    return Reddest().eval().requires_grad_(False)


def made(name: str, folder: Path, n: int = 120) -> DenseSet:
    """A set of blocks of colour: targets are noisier where they are red, or which colour leads."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(30, 226, (n, 3, SIDE // 4, SIDE // 4))
    x = np.repeat(np.repeat(coarse, 4, 2), 4, 3).astype(np.uint8)
    net = {"sharpen": sharpen, "reddest": reddest}[name]()
    z = net(torch.from_numpy(x).float()).numpy()
    columns = {"image": x, "photo": np.array([f"photo{i // PER_PHOTO}" for i in range(n)])}
    if name == "sharpen":
        noise = rng.normal(size=z.shape) * x[:, :1] / 2550
        columns["target"] = (z + noise).astype(np.float32)
    else:
        masks = np.stack([(z + rng.gumbel(size=z.shape)).argmax(1) for _ in range(4)], 1)
        columns |= {"target": masks[:, 0].astype(np.uint8), "annotations": masks.astype(np.uint8)}
    np.savez(folder / "data.npz", allow_pickle=False, **columns)
    example = torch.from_numpy(x[:4].astype(np.float32))
    model = folder / "model.onnx"
    model.write_bytes(export_torch(net, (example,), input_names=["image"]).model)
    return DenseSet(
        name=name,
        task="regression" if name == "sharpen" else "classification",
        model=model,
        any_size=model,
        multiple=1,
        factory=f"{__name__}:{name}",
        table=folder / "data.npz",
        parquet=folder / "data.parquet",
        images=n,
        photos=n // PER_PHOTO,
        inputs={"image": ("image",)},
    )


@pytest.fixture(scope="module")
def restoration(tmp_path_factory: pytest.TempPathFactory) -> DenseSet:
    return made("sharpen", tmp_path_factory.mktemp("sharpen"))


@pytest.mark.long
def test_a_split_of_an_image_regression(restoration: DenseSet) -> None:
    found = {r["module"]: r for r in dense.measure(restoration, 0, steps=60)}
    assert list(found) == [
        *("none", "loss", "bayescap", "mc_dropout", "bayescap_image"),
        *("test-time augmentation", "dropout left on"),
    ]
    assert not [r for r in found.values() if "error" in r]
    base = found["none"]
    assert base["nll_difference"] == 0.0
    own = found["bayescap"]  # it sees how red a pixel is
    assert own["nll_difference"] == own["nll"] - base["nll"] < -0.05
    assert own["ause"] < 0.8 * own["ause_random"] and own["pearson"] > 0.2
    assert found["dropout left on"]["ause_random"] == pytest.approx(base["ause_random"], abs=1e-5)

    result = {"splits": 1, "alpha": 0.1, "samples": 8}
    result |= json.loads(json.dumps(dense.tables([restoration], list(found.values()))))
    page = table.page(result)
    assert f"120 images of 60 photos, {base['images']} of them to test" in page
    lines = [line for line in page.splitlines() if line.startswith(("| `", "| *"))]
    assert lines[0].startswith("| `none` | +0.0000 |") and len(lines) == 7
    assert f"| {own['ause']:.4f} |" in next(line for line in lines if "`bayescap`" in line)
    assert "| *dropout left on* | – | – | – |" in page and "±" not in lines[0]


def test_test_images_are_of_photos_that_no_fit_saw(restoration: DenseSet, tmp_path: Path) -> None:
    options = dense._options(restoration, "none", {}, 3)
    material = dense.cached(restoration, restoration.model, options, tmp_path)
    photos = {}
    for role in ROLES:
        rows = dense.images_of(material, 3, role)
        photos[role] = set(dense.images(restoration, rows)[2])
        assert len(rows) == PER_PHOTO * len(photos[role])
    assert sum(map(len, photos.values())) == len(set.union(*photos.values())) == 60
    assert len(split(material, 3)) == 120 * material.per


def test_segmentation_knows_its_annotators(tmp_path: Path) -> None:
    given = made("reddest", tmp_path)
    material = dense.cached(given, given.model, dense._options(given, "none", {}, 0), tmp_path)
    names = [m.name for m in dense.methods(given, material, 1)]
    assert {"none", "laplace", "vbll", "loss", "mc_dropout"} <= set(names)
    assert "bayescap_image" not in names and "abnn" not in names
    base, own = (
        dense.fitted(given, dense.Method(m, given.model), 0, material, tmp_path)
        for m in ("none", "laplace_diag")
    )
    assert 0 < base["ged"] < 2 and "ged" not in own
    assert own["accuracy"] == base["accuracy"] > 0.5
    assert own["images"] == base["images"] == len(dense.images_of(material, 0, "test"))


def test_methods_follow_the_layers(restoration: DenseSet) -> None:
    names = [n for n in onnx.load(restoration.model).graph.node if n.op_type == "Relu"]
    assert dense.last_but_one(restoration.model) == names[0].output[0]
    dropout, cap = dense.network_methods(restoration, 7)
    assert (dropout.name, dropout.settings["at"]) == ("mc_dropout", names[0].output[0])
    assert (cap.name, cap.settings) == ("bayescap_image", {"steps": 7})
    layers = [type(m).__name__ for m in networks.UNet().modules()]
    assert "Dropout2d" in layers and "BatchNorm2d" in layers  # as `network_methods` asks


def test_a_smaller_table(restoration: DenseSet, tmp_path: Path) -> None:
    small = dense.sampled(restoration, 30, tmp_path)
    with np.load(restoration.table) as whole, np.load(small.table) as part:
        assert len(part["photo"]) == small.images == 30
        assert small.photos == len(set(part["photo"]))
        places = [np.flatnonzero((whole["image"] == x).all((1, 2, 3))) for x in part["image"]]
        rows = np.concatenate(places)
        assert (np.diff(rows) > 0).all()
        assert (whole["target"][rows] == part["target"]).all()
    assert dense.sampled(restoration, 10_000, tmp_path).images == 120


def test_augmentation_asks_all_eight_views() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    assert dense_peers.augmented(lambda v: 2 * v, x).max() < 1e-6  # it turns with the image
    where = np.arange(16.0).reshape(1, 1, 4, 4)
    views = [np.rot90(where, k, (2, 3)) for k in range(4)]
    views += [np.rot90(where[..., ::-1], k, (2, 3)) for k in range(4)]
    want = np.broadcast_to(np.std(views, 0), x[:, :1].shape)
    got = dense_peers.augmented(lambda v: np.broadcast_to(where, v[:, :1].shape), x)
    assert np.allclose(got, want)


def test_dropout_at_a_linear_layer_has_the_binomial_variance() -> None:
    layer = nn.Conv2d(3, 2, 1)
    net = nn.Sequential(nn.ReLU(), layer).eval().requires_grad_(False)
    x = np.random.default_rng(0).uniform(1, 2, (3, 3, 8, 8)).astype(np.float32)
    got = dense_peers.dropped(net, layer, x, samples=4000, rate=0.2)
    w = layer.weight[:, :, 0, 0].double().numpy()
    want = np.sqrt(0.2 / 0.8 * np.einsum("kc,nchw->nkhw", w**2, x.astype(float) ** 2))
    assert np.abs(got / want - 1).max() < 0.08
    again = dense_peers.dropped(net, layer, x, samples=2, seed=1)
    assert (again == dense_peers.dropped(net, layer, x, samples=2, seed=1)).all()
    assert (net(torch.from_numpy(x)) == net(torch.from_numpy(x))).all()  # the hook is gone


def test_figures_of_a_peer() -> None:
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.1, 2, (5, 1, 9, 9))
    error = sigma * rng.normal(size=sigma.shape)
    error[4] = 0.0  # no order to find there
    found = dense_peers.figures(error, sigma)
    each = [pearsonr(abs(e.ravel()), s.ravel())[0] for e, s in zip(error[:4], sigma, strict=False)]
    assert found["pearson"] == pytest.approx(np.mean(each))
    assert found["pearson_pooled"] == pytest.approx(pearsonr(abs(error).ravel(), sigma.ravel())[0])
    assert 0 < found["ause"] < found["ause_random"]
    assert math.isnan(dense_peers.figures(0 * error, sigma)["ause"])


def test_the_cap_of_maps_beside_the_peers(restoration: DenseSet) -> None:
    settings = Settings(channels=6, blocks=0, crop=16, steps=150, learning_rate=1e-2)
    found = bayescap.on_images(restoration, 120, settings)
    assert found["photos"] * PER_PHOTO == found["images"]
    assert found["ause"] < found["ause_random"] and found["nll_difference_interval"][1] < 0
    assert 0 < found["uce_ratio"] < 0.5
    assert set(found["beside"]) == {"test-time augmentation", "dropout left on"}
    json.dumps(found)
