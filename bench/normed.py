"""Residual networks for Fashion-MNIST with dropout and one kind of normalisation each.

Networks that hold dropout and normalisation and come with labelled rows that they never saw have
no publisher, so these are trained here, once, seeded: on 40,000 of the 60,000 training images; the
other 20,000 and the 10,000 test images stay fresh. The weights are kept in the asset cache under a
digest of what makes them. ``python -m bench.normed KIND`` trains one and prints how good it is.

A peer's process imports this page too, so that at the top it needs nothing but torch.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Kind = Literal["batch", "layer", "group", "instance", "rms"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CLASSES = 10
MEAN, SCALE = 0.2860, 0.3530  # of the training pixels in [0, 1]
TRAIN_ROWS = 40_000
ORDER_SEED = 0
TABLES = "1"  # raise it when the rows change: it names the cache folder


@dataclass(frozen=True, slots=True)
class Recipe:
    """Passes over the rows, rows of a step, highest learning rate, weight decay, and seed."""

    epochs: int = 6
    rows: int = TRAIN_ROWS
    batch: int = 128
    rate: float = 0.1
    decay: float = 5e-4
    seed: int = 0


# Good enough to be worth calibrating where a figure is published, a minute's work elsewhere.
_SHORT = Recipe(epochs=2, rows=20_000, rate=0.05)
RECIPES: dict[Kind, Recipe] = {k: Recipe() if k == "batch" else _SHORT for k in KINDS}


class ChannelsLast(nn.Module):
    """A normalisation over the channels of each pixel of N×C×H×W, as ConvNeXt does it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W -> N×C×H×W."""
        y: Tensor = self.norm(x.movedim(1, -1))
        return y.movedim(-1, 1)


def normalisation(kind: Kind, channels: int) -> nn.Module:
    """An affine normalisation of N×C×H×W."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(8, channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return ChannelsLast(nn.LayerNorm(channels) if kind == "layer" else nn.RMSNorm(channels))


class Block(nn.Module):
    """Two 3×3 convolutions beside a short cut (1×1 where the shape changes), then dropout."""

    def __init__(self, kind: Kind, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = normalisation(kind, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = normalisation(kind, outside)
        self.short: nn.Module = nn.Identity()
        if inside != outside or stride != 1:
            conv = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.short = nn.Sequential(conv, normalisation(kind, outside))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """N×inside×H×W -> N×outside×H/stride×W/stride."""
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y)) + self.short(x)
        dropped: Tensor = self.dropout(torch.relu(y))
        return dropped


class Normed(nn.Module):
    """N×1×28×28 in [0, 1] -> N×10 logits; 128 features, about 300,000 parameters."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = normalisation(kind, 16)
        self.block1 = Block(kind, 16, 32, 1)
        self.block2 = Block(kind, 32, 64, 2)
        self.block3 = Block(kind, 64, 128, 2)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """N×1×28×28 -> N×10."""
        x = torch.relu(self.norm(self.conv((image - MEAN) / SCALE)))
        x = nn.functional.max_pool2d(x, 2)
        x = self.block3(self.block2(self.block1(x)))
        logits: Tensor = self.head(self.dropout(x.mean((2, 3))))
        return logits


def train(
    kind: Kind, images: NDArray[np.uint8], labels: NDArray[np.int64], recipe: Recipe
) -> Normed:
    """A network trained on images N×28×28 and labels N: SGD on cross-entropy, one cycle of the
    learning rate. One thread, so that one machine gives the same weights every time; torch's
    generator and thread count are left as they were."""
    from bench.networks import one_thread

    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        x = as_input(images[: recipe.rows])
        y = torch.from_numpy(labels[: recipe.rows])
        # Channels last is a fifth faster on a CPU.
        net = Normed(kind).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        steps = len(x) // recipe.batch
        optimiser = torch.optim.SGD(
            net.parameters(), recipe.rate, momentum=0.9, weight_decay=recipe.decay, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, recipe.rate, total_steps=recipe.epochs * steps
        )
        for _ in range(recipe.epochs):
            order = torch.randperm(len(x))
            for rows in order[: steps * recipe.batch].view(steps, recipe.batch):
                optimiser.zero_grad()
                loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
                torch.autograd.backward(loss)
                optimiser.step()
                schedule.step()
        net = net.to(memory_format=torch.contiguous_format)
    trained: Normed = net.eval().requires_grad_(False)
    return trained


def as_input(images: NDArray[np.uint8]) -> Tensor:
    """Images N×28×28 as the networks take them: N×1×28×28 in [0, 1]."""
    return torch.from_numpy(images[:, None] / np.float32(255))


def weights(kind: Kind) -> Path:
    """The trained weights (safetensors) in the asset cache, trained there on first use."""
    from safetensors.torch import save_model

    from bench.assets import cached

    def make(folder: Path) -> None:
        net = train(kind, *rows("train"), RECIPES[kind])
        save_model(net, str(folder / "weights.safetensors"))

    return cached(f"fashion-{kind}-{_digest(kind)}", make) / "weights.safetensors"


def load(kind: Kind, path: str | Path) -> Normed:
    """A network with weights from a file, in evaluation mode."""
    from safetensors.torch import load_model

    net = Normed(kind)
    load_model(net, str(path))
    return net.eval().requires_grad_(False)


def fashion(kind: Kind) -> Normed:
    """The trained network of one kind."""
    return load(kind, weights(kind))


def fashion_batch() -> nn.Module:
    """Batch normalisation."""
    return fashion("batch")


def fashion_layer() -> nn.Module:
    """Layer normalisation over the channels of each pixel."""
    return fashion("layer")


def fashion_group() -> nn.Module:
    """Group normalisation, 8 groups."""
    return fashion("group")


def fashion_instance() -> nn.Module:
    """Instance normalisation with an affine map."""
    return fashion("instance")


def fashion_rms() -> nn.Module:
    """Root-mean-square normalisation over the channels of each pixel."""
    return fashion("rms")


def rows(
    part: Literal["train", "fresh", "test"],
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images N×28×28 and labels N: the 40,000 that the networks learn from, the 20,000 training
    images that they never see, or the 10,000 test images."""
    from bench.assets import fashion_mnist

    if part == "test":
        return fashion_mnist("test")
    images, labels = fashion_mnist("train")
    order = np.random.default_rng(ORDER_SEED).permutation(len(images))
    chosen = order[:TRAIN_ROWS] if part == "train" else order[TRAIN_ROWS:]
    return images[chosen], labels[chosen]


def table(part: Literal["train", "fresh", "test"], first: int | None = None) -> Path:
    """``rows`` (or the first of them) as a Parquet file with the columns ``image`` (1×28×28
    float32) and ``label``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from bench.assets import cached

    def make(folder: Path) -> None:
        images, labels = rows(part)
        x, labels = as_input(images[:first]).numpy(), labels[:first]
        kind = pa.fixed_shape_tensor(pa.float32(), x.shape[1:])
        flat = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x[0].size)
        column = pa.ExtensionArray.from_storage(kind, flat)
        whole = pa.table({"image": column, "label": pa.array(labels)})
        pq.write_table(whole, folder / "rows.parquet", compression="zstd")

    name = part if first is None else f"{part}-{first}"
    return cached(f"fashion-{name}-{TABLES}", make) / "rows.parquet"


def model(kind: Kind) -> Path:
    """The network as ONNX (input ``image``) in the asset cache; dropout is the identity in it."""
    from bench.assets import cached
    from posthoc.export import export_torch

    def make(folder: Path) -> None:
        sample = as_input(rows("test")[0][:64])
        exported = export_torch(fashion(kind), (sample,), input_names=["image"])
        (folder / "model.onnx").write_bytes(exported.model)

    return cached(f"fashion-{kind}-onnx-{_digest(kind)}", make) / "model.onnx"


def accuracy(net: nn.Module, part: Literal["fresh", "test"] = "test") -> float:
    """Share of the images whose label the network gets right."""
    images, labels = rows(part)
    with torch.inference_mode():
        found = [net(as_input(images[i : i + 500])).argmax(1) for i in range(0, len(images), 500)]
    return float((torch.cat(found).numpy() == labels).mean())


def _digest(kind: Kind) -> str:
    """Of everything that the weights depend on."""
    parts: tuple[Any, ...] = (ChannelsLast, normalisation, Block, Normed, train, as_input, rows)
    text = [inspect.getsource(p) for p in parts]
    text.append(repr((kind, RECIPES[kind], MEAN, SCALE, ORDER_SEED)))
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:12]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: python -m bench.normed {'|'.join(KINDS)}")
    print(f"test accuracy {accuracy(fashion(sys.argv[1])):.4f}")
