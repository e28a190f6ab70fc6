"""Networks with a map as output: weights as published, training that repeats, exports that hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench import dense_networks as networks
from bench.assets import fetch
from bench.dense_assets import Patches, decode
from bench.dense_material import INPUT, export, psnr
from posthoc.contract import HedgedError
from posthoc.runtime import open_session


def _patches(n: int = 6) -> Patches:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8)
    return Patches(pixels.repeat(8, 1).repeat(8, 2), np.arange(n) // 2, tuple("abc"))


def _manifest(folder: Path, kind: str = "float32", spare: int = 0) -> tuple[Path, np.ndarray]:
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 4)).astype("<f4")
    bias = np.arange(4, dtype="<f4")
    (folder / "a.bin").write_bytes(kernel.tobytes()[:100])
    (folder / "b.bin").write_bytes(kernel.tobytes()[100:] + bias.tobytes() + bytes(spare))
    weights = [
        {"name": "conv/kernel", "shape": [3, 3, 2, 4], "dtype": kind},
        {"name": "conv/bias", "shape": [4], "dtype": "float32"},
    ]
    path = folder / "model.json"
    path.write_text(
        json.dumps({"weightsManifest": [{"paths": ["a.bin", "b.bin"], "weights": weights}]})
    )
    return path, kernel


def test_a_layers_model_convolves_as_keras_does(tmp_path: Path) -> None:
    path, kernel = _manifest(tmp_path)
    conv = nn.Conv2d(2, 4, 3, padding=1)
    conv.load_state_dict({k.split(".")[1]: v for k, v in networks.read_layers(path).items()})
    x = np.random.default_rng(1).normal(size=(5, 6, 2)).astype(np.float32)  # H×W×channels
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    want = np.zeros((5, 6, 4))
    for i in range(5):
        for j in range(6):
            want[i, j] = np.einsum("hwc,hwco->o", padded[i : i + 3, j : j + 3], kernel)
    want += np.arange(4)
    with torch.no_grad():
        got = conv(torch.from_numpy(x.transpose(2, 0, 1)[None]))[0]
    assert np.abs(got.numpy().transpose(1, 2, 0) - want).max() < 1e-4


def test_layers_models_that_are_refused(tmp_path: Path) -> None:
    path, _ = _manifest(tmp_path, kind="uint8")
    with pytest.raises(HedgedError, match="conv/kernel is not plain float32"):
        networks.read_layers(path)
    path, _ = _manifest(tmp_path, spare=4)
    with pytest.raises(HedgedError, match="308 bytes of weights, 304 in the manifest"):
        networks.read_layers(path)


def test_esrgan_slim_is_the_published_one() -> None:
    net = networks.esrgan_slim()
    assert sum(p.numel() for p in net.parameters()) == 222_075
    whole = decode(fetch("skimage-photos") / "coffee.png")
    truth = whole[: whole.shape[0] // 2 * 2, : whole.shape[1] // 2 * 2]
    height, width = truth.shape[:2]
    bicubic = Image.Resampling.BICUBIC
    small = Image.fromarray(truth).resize((width // 2, height // 2), bicubic)
    x = torch.from_numpy(np.array(small, np.float32).transpose(2, 0, 1)[None])
    got = net(x).clamp(0, 255)[0].numpy().transpose(1, 2, 0)
    smooth = np.array(small.resize((width, height), bicubic))
    ours, plain = (float(psnr(z[None], truth[None])[0]) for z in (got, smooth))
    # On the photos of scikit-image and scikit-learn together: 29.2 dB against 29.6.
    assert 27 < ours < 35
    assert -1.5 < ours - plain < 0.5


def test_a_new_denoiser_nearly_leaves_the_image_as_it_is() -> None:
    torch.manual_seed(0)
    net = networks.DnCnn().eval()
    x = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (2, 3, 20, 12))).float()
    with torch.no_grad():
        z = net(x) * networks.SCALE
        features = torch.cat([net.body(x / networks.SCALE), x / networks.SCALE], 1)
        head = torch.einsum("oc,nchw->nohw", net.head.weight[..., 0, 0], features)
    assert net.head.bias is not None
    want = (head + net.head.bias[:, None, None]) * networks.SCALE
    assert torch.allclose(z, want, atol=1e-2)  # the head is linear in what it sees
    assert (z - x).abs().mean() < 15


@pytest.mark.parametrize("train", [networks.train_denoiser, networks.train_segmenter])
def test_the_same_patches_give_the_same_network_and_leave_no_trace(train) -> None:  # type: ignore[no-untyped-def]
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    recipes = [networks.Recipe(2, 2, 1e-3, seed=s) for s in (0, 0, 1)]
    first, second, other = (train(_patches(), r).state_dict() for r in recipes)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_trained_denoiser_answers_in_the_images_units() -> None:
    net = networks.train_denoiser(_patches(), networks.Recipe(40, 4, 3e-3))
    rng = np.random.default_rng(1)
    clean = torch.from_numpy(_patches().pixels.transpose(0, 3, 1, 2).astype(np.float32))
    noisy = clean + torch.from_numpy(rng.normal(0, 25, clean.shape)).float()
    left = (net(noisy) - clean).square().mean().sqrt()
    assert left < 0.95 * 25
    assert not any(p.requires_grad for p in net.parameters())


def test_a_short_training_segments_better_than_chance() -> None:
    net = networks.train_segmenter(_patches(), networks.Recipe(25, 4, 1e-2))
    x, y = next(networks._drawn(_patches(), networks.Recipe(1, 16, 0.0, seed=7)))
    nll = nn.functional.cross_entropy(net(x), y)
    assert nll < np.log(4)


def test_weights_come_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEDGED_ASSETS", str(tmp_path))
    monkeypatch.setattr(networks, "training_patches", _patches)
    recipe = networks.Recipe(1, 2, 1e-3)
    calls = []

    def train(given: Patches) -> nn.Module:
        calls.append(len(given.photo))
        return networks.train_denoiser(given, recipe)

    made = [networks._from_cache("made", networks.DnCnn, train) for _ in range(2)]
    assert calls == [6]
    assert [p.name for p in tmp_path.iterdir()] == [f"dense-made-{networks.VERSION}"]
    states = [m.state_dict() for m in made]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not any(m.training for m in made)


@pytest.mark.long
def test_exports_for_one_size_and_for_any(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = networks.UNet(width=2).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    export(net, rng.integers(0, 256, (3, 3, 16, 16), np.uint8), tmp_path, multiple=4)
    fixed, free = (open_session(tmp_path / n) for n in ("model.onnx", "any-size.onnx"))
    assert fixed.get_inputs()[0].shape[1:] == [3, 16, 16]
    for shape in ((2, 3, 16, 16), (1, 3, 24, 40), (5, 3, 8, 12)):
        x = rng.uniform(0, 255, shape).astype(np.float32)
        want = net(torch.from_numpy(x)).numpy()
        assert want.shape == (shape[0], 4, *shape[2:])
        for session in (fixed, free) if shape[2:] == (16, 16) else (free,):
            assert np.abs(session.run(None, {INPUT: x})[0] - want).max() < 1e-4
