"""A network of ResNet-18's shape with random weights: for speed, where quality does not matter.

He, Zhang, Ren & Sun 2016, "Deep Residual Learning for Image Recognition", table 1: 11.7 million
parameters, N×3×224×224 -> 512 features -> 1,000 logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.assets import cached
from posthoc.contract import Features, LinearHead
from posthoc.export import export_torch

VERSION = "1"  # raise it when the network changes: it names the cache folder
SIZE = 224
CLASSES = 1000
FEATURES = 512
SEED = 0


class Block(nn.Module):
    """Two 3×3 convolutions beside a short cut, which is a 1×1 convolution where the shape
    changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inside, outside, 3, stride)
        self.second = _convolution(outside, outside, 3, 1)
        same = inside == outside and stride == 1
        self.short = nn.Identity() if same else _convolution(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """N×inside×H×W -> N×outside×H/stride×W/stride."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.short(x))


def _convolution(inside: int, outside: int, size: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inside, outside, size, stride, size // 2, bias=False), nn.BatchNorm2d(outside)
    )


def resnet18() -> nn.Module:
    """The network in evaluation mode, the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        layers: list[nn.Module] = [
            _convolution(3, 64, 7, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        width = 64
        for outside, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [Block(width, outside, stride), Block(outside, outside, 1)]
            width = outside
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(FEATURES, CLASSES)]
        net = nn.Sequential(*layers)
    return net.eval().requires_grad_(False)


def model() -> Path:
    """``resnet18.onnx`` in the asset cache, exported there on first use (input ``image``)."""

    def make(folder: Path) -> None:
        exported = export_torch(resnet18(), (images(2),), input_names=["image"])
        (folder / "resnet18.onnx").write_bytes(exported.model)

    return cached(f"resnet18-{VERSION}", make) / "resnet18.onnx"


def images(n: int) -> np.ndarray:
    """``n`` standard normal images, N×3×224×224 float32."""
    return np.random.default_rng(SEED).standard_normal((n, 3, SIZE, SIZE), np.float32)


def rows(head: LinearHead, n: int, seed: int) -> Features:
    """``n`` made-up labelled rows for a fit: rectified normal features, the head's own logits with
    their spread set to that of a trained network, labels drawn from their softmax."""
    rng = np.random.default_rng(seed)
    phi = np.maximum(rng.standard_normal((n, head.weight.shape[1])), 0)
    z = phi @ head.weight.T + head.bias
    labels = (3 * z / z.std() + rng.gumbel(size=z.shape)).argmax(1)
    return Features(phi.astype(np.float32), z.astype(np.float32), labels)
