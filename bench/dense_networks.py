"""Networks with a map as output: one that others trained, and two trained here, once, seeded.

All take sRGB images N×3×H×W on the scale 0–255 (float32). Weights trained here are kept in the
asset cache as safetensors. ``python -m bench.dense_networks`` trains what is not there yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.assets import cached, fetch
from bench.dense_assets import Patches, patches, shares
from bench.dense_sets import CLASSES, add_noise, channels_first, composite, noise_map
from bench.networks import one_thread
from posthoc.contract import HedgedError

VERSION = 1  # raise it when training or its data change: it names the cache folders
TRAIN_SHARE = 1 / 3  # of the photos; the others make the tables
SCALE = 255.0

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps of Adam, images of a step, and the highest learning rate, which then falls to zero."""

    steps: int
    batch: int
    rate: float
    seed: int = 0


DENOISE = Recipe(steps=700, batch=16, rate=2e-3)
SEGMENT = Recipe(steps=800, batch=16, rate=1e-2)


class EsrganSlim(nn.Module):
    """A residual dense network (Zhang et al. 2018, "Residual Dense Network for Image
    Super-Resolution") of the size C=1, D=2, G=4, G0=64, ×2: N×3×H×W -> N×3×2H×2W.

    Layers bear the names of the package's own (Keras) model.
    """

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "F_m1": (3, 64, 3), "F_0": (64, 64, 3),
            "F_1_1": (64, 4, 3), "LFF_1": (68, 64, 1),
            "F_2_1": (64, 4, 3), "LFF_2": (68, 64, 1),
            "GFF_1": (128, 64, 1), "GFF_2": (64, 64, 3),
            "UPN1": (64, 64, 5), "UPN2": (64, 32, 3), "UPN3": (32, 12, 3), "SR": (12, 3, 3),
        }  # fmt: skip
        for name, (inside, outside, size) in shapes.items():
            self.add_module(name, nn.Conv2d(inside, outside, size, padding=size // 2))
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        """Low resolution -> high resolution, both on the scale 0–255."""
        layer = self.get_submodule
        shallow = layer("F_m1")(x)
        first = layer("F_0")(shallow)
        blocks = []
        for i in (1, 2):
            grown = torch.relu(layer(f"F_{i}_1")(first))
            first = layer(f"LFF_{i}")(torch.cat([first, grown], 1)) + first
            blocks.append(first)
        deep = layer("GFF_2")(layer("GFF_1")(torch.cat(blocks, 1))) + shallow
        wide = torch.relu(layer("UPN2")(torch.relu(layer("UPN1")(deep))))
        out: Tensor = layer("SR")(self.upsample(layer("UPN3")(wide)))
        return out


class DnCnn(nn.Module):
    """A small denoiser after Zhang et al. 2017 ("Beyond a Gaussian Denoiser"): five convolutions
    of 32 channels, batch norm in all but the first; it learns the noise.

    The last layer is a 1×1 convolution over the features and the noisy image itself, so that the
    subtraction of the noise is part of the linear head: z = W [h, x] + b.
    """

    def __init__(self, width: int = 32, layers: int = 5) -> None:
        super().__init__()
        body: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(layers - 1):
            body += _normed(width, width)
        self.body = nn.Sequential(*body)
        self.head = nn.Conv2d(width + 3, 3, 1)
        with torch.no_grad():  # at first it nearly leaves the image as it is
            for parameter in self.head.parameters():
                parameter.mul_(0.1)
            self.head.weight[:, width:] = torch.eye(3)[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Noisy on the scale 0–255 -> clean, on the head's scale (a new one's: 0–1)."""
        x = x / SCALE
        clean: Tensor = self.head(torch.cat([self.body(x), x], 1))
        return clean


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al. 2015) of three levels with batch norm, dropout at the
    bottom, and a 1×1 convolution as its head: N×3×H×W -> logits N×4×H×W.

    H and W must be multiples of four.
    """

    def __init__(self, width: int = 12, rate: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Sequential(*_normed(3, width), *_normed(width, width))
        self.second = nn.Sequential(*_normed(width, 2 * width), *_normed(2 * width, 2 * width))
        self.bottom = nn.Sequential(
            *_normed(2 * width, 4 * width), nn.Dropout2d(rate), *_normed(4 * width, 4 * width)
        )
        self.up_second = nn.Sequential(*_normed(6 * width, 2 * width))
        self.up_first = nn.Sequential(*_normed(3 * width, width), *_normed(width, width))
        self.head = nn.Conv2d(width, len(CLASSES), 1)
        self.down = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        """Images on the scale 0–255 -> a logit for each class at each pixel."""
        one = self.first(x / SCALE - 0.5)
        two = self.second(self.down(one))
        deep = self.bottom(self.down(two))
        two = self.up_second(torch.cat([self.up(deep), two], 1))
        one = self.up_first(torch.cat([self.up(two), one], 1))
        logits: Tensor = self.head(one)
        return logits


def _normed(inside: int, outside: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inside, outside, 3, padding=1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(),
    ]


def esrgan_slim() -> nn.Module:
    """ESRGAN-slim ×2 with its published weights (npm @upscalerjs/esrgan-slim), frozen."""
    folder = fetch("esrgan-slim")
    net = EsrganSlim()
    net.load_state_dict(read_layers(folder / "model.json"))
    return net.eval().requires_grad_(False)


def read_layers(path: Path) -> dict[str, Tensor]:
    """Weights of a TensorFlow.js layers model by layer: kernels H×W×I×O as O×I×H×W.

    Raises HedgedError for a manifest in another form than float32 in files beside it.
    """
    state = {}
    for group in json.loads(path.read_text(encoding="utf-8"))["weightsManifest"]:
        data = b"".join((path.parent / name).read_bytes() for name in group["paths"])
        at = 0
        for entry in group["weights"]:
            if entry["dtype"] != "float32" or "quantization" in entry:
                raise HedgedError(f"{path}: {entry['name']} is not plain float32")
            n = int(np.prod(entry["shape"]))
            values = np.frombuffer(data, "<f4", n, at).reshape(entry["shape"]).copy()
            at += 4 * n
            layer, kind = entry["name"].split("/")
            if kind == "kernel":
                state[f"{layer}.weight"] = torch.from_numpy(values.transpose(3, 2, 0, 1).copy())
            else:
                state[f"{layer}.{kind}"] = torch.from_numpy(values)
        if at != len(data):
            raise HedgedError(f"{path}: {len(data)} bytes of weights, {at} in the manifest")
    return state


def dncnn() -> nn.Module:
    """The denoiser, trained on first use (one or two minutes), frozen."""
    return _from_cache("dncnn", DnCnn, train_denoiser)


def unet() -> nn.Module:
    """The U-Net for `dense_sets.segmentation`, trained on first use (two minutes), frozen."""
    return _from_cache("unet", UNet, train_segmenter)


def train_denoiser(given: Patches, recipe: Recipe = DENOISE) -> nn.Module:
    """A `DnCnn` from clean patches: squared error on crops 32×32, turned and mirrored at random,
    half of them with the same noise everywhere (`dense_sets.noise_map`)."""
    with _seeded(recipe):
        net = DnCnn()
        _descend(net, _noisy(given, recipe), nn.functional.mse_loss, recipe)
        with torch.no_grad():  # into the head, so that the graph ends in a linear layer
            for parameter in net.head.parameters():
                parameter.mul_(SCALE)
    return net.eval().requires_grad_(False)


def train_segmenter(given: Patches, recipe: Recipe = SEGMENT) -> nn.Module:
    """A `UNet` from photo patches, on composites that are drawn as it goes: cross-entropy."""
    with _seeded(recipe):
        net = UNet()
        _descend(net, _drawn(given, recipe), nn.functional.cross_entropy, recipe)
    return net.eval().requires_grad_(False)


def training_patches() -> Patches:
    """The patches of the photos that networks are trained on."""
    every = patches()
    return every.of(shares(len(every.names), TRAIN_SHARE)[0])


def held_out_patches() -> Patches:
    """The patches of the other photos, which no network here has seen."""
    every = patches()
    return every.of(shares(len(every.names), TRAIN_SHARE)[1])


def _noisy(given: Patches, recipe: Recipe) -> Batches:
    clean = channels_first(given.pixels)
    half = clean.shape[-1] // 2
    for step in range(recipe.steps):
        rng = np.random.default_rng([recipe.seed, step])
        pairs = []
        for i in range(recipe.batch):
            whole = clean[rng.integers(len(clean))]
            sigma = noise_map(rng, even=i % 2 == 0)
            noisy = add_noise(whole, sigma, rng)
            top, left = rng.integers(half + 1, size=2)
            turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
            pair = np.stack([noisy, whole])[..., top : top + half, left : left + half]
            pair = np.rot90(pair, turns, (-2, -1))
            pairs.append(pair[..., ::-1] if mirrored else pair)
        both = torch.from_numpy(np.stack(pairs, 1).astype(np.float32))
        yield both[0], both[1] / SCALE


def _drawn(given: Patches, recipe: Recipe) -> Batches:
    for step in range(recipe.steps):
        rng = np.random.default_rng([recipe.seed, step])
        images, masks = [], []
        for _ in range(recipe.batch):
            row = int(rng.integers(len(given.photo)))
            same = np.flatnonzero(given.photo == given.photo[row])
            fill = given.pixels[int(rng.choice(same))]
            image, drawn = composite(given.pixels[row], fill, rng)
            images.append(image)
            masks.append(drawn[0])
        x = channels_first(np.stack(images)).astype(np.float32)
        yield torch.from_numpy(x), torch.from_numpy(np.stack(masks).astype(np.int64))


def _descend(
    net: nn.Module, batches: Batches, loss: Callable[[Tensor, Tensor], Tensor], recipe: Recipe
) -> None:
    """Adam; the learning rate rises and falls once (Smith & Topin 2018)."""
    optimiser = torch.optim.Adam(net.parameters(), lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.rate, total_steps=recipe.steps, pct_start=0.2
    )
    for x, y in batches:
        optimiser.zero_grad()
        torch.autograd.backward(loss(net(x), y))
        optimiser.step()
        schedule.step()


@contextmanager
def _seeded(recipe: Recipe) -> Iterator[None]:
    """One thread and a generator of its own, so that the same patches give the same weights."""
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        yield


def _from_cache(
    name: str, build: Callable[[], nn.Module], train: Callable[[Patches], nn.Module]
) -> nn.Module:
    def make(folder: Path) -> None:
        save_file(train(training_patches()).state_dict(), folder / "weights.safetensors")

    folder = cached(f"dense-{name}-{VERSION}", make)
    net = build()
    net.load_state_dict(load_file(folder / "weights.safetensors"))
    return net.eval().requires_grad_(False)


if __name__ == "__main__":
    for factory in (esrgan_slim, dncnn, unet):
        start = time.perf_counter()
        parameters = sum(p.numel() for p in factory().parameters())
        print(
            f"{factory.__name__:12}{parameters:9,} parameters{time.perf_counter() - start:8.1f} s"
        )
