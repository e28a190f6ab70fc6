"""The network of an image cap, described once for torch (fit) and ONNX (serving).

Standardisation, a 3×3 convolution, residual blocks, a head of two more; no normalisation, which
would mix pixels. Its tensors are ``mean`` K and ``scale`` K of the input and, by layer, ``weight``
n×m×3×3, ``bias`` n and the ``slope`` n of what lies below zero (PReLU, He et al. 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from posthoc.contract import Array

if TYPE_CHECKING:
    from torch import Tensor

    from posthoc.graph import Fragment

T = TypeVar("T")

REACH = 10.0  # standard deviations that a pixel may count


def radius(blocks: int) -> int:
    """How many pixels away the network sees."""
    return 2 * blocks + 3


def start(k: int, channels: int, blocks: int, rng: np.random.Generator) -> dict[str, Array]:
    """Weights after He et al. 2015, a tenth of that where a block comes back, and zero at the end,
    so that the network starts as the constant 0."""
    names = [f"block{i}.{part}" for i in range(blocks) for part in ("in", "out")]
    found: dict[str, Array] = {}
    for name in ("first", *names, "head"):
        n_in = k if name == "first" else channels
        size = np.sqrt(2.0 / (9 * n_in)) * (0.1 if name.endswith(".out") else 1.0)
        found[f"{name}.weight"] = rng.standard_normal((channels, n_in, 3, 3)) * size
        found[f"{name}.bias"] = np.zeros(channels)
        if not name.endswith(".out"):
            found[f"{name}.slope"] = np.full(channels, 0.25)
    return {**found, "last.weight": np.zeros((2 * k, channels, 3, 3)), "last.bias": np.zeros(2 * k)}


def forward(t: Mapping[str, Tensor], blocks: int, z: Tensor) -> Tensor:
    """The network on maps N×K×H×W: N×2K×H×W, in torch."""
    from torch.nn import functional

    def convolve(x: Tensor, name: str) -> Tensor:
        return functional.conv2d(x, t[f"{name}.weight"], t[f"{name}.bias"], padding=1)

    def rectify(x: Tensor, name: str) -> Tensor:
        return functional.prelu(x, t[f"{name}.slope"])

    x = (z - t["mean"][:, None, None]) * t["scale"][:, None, None]
    return _layers(x.clamp(-REACH, REACH), blocks, convolve, rectify, lambda a, b: a + b)


def emit(g: Fragment, tensors: Mapping[str, Array], blocks: int, z: str) -> str:
    """The network on the map ``z`` N×K×H×W as a graph fragment."""

    def constant(name: str) -> str:
        return g.const(tensors[name][:, None, None])

    def convolve(x: str, name: str) -> str:
        weight, bias = g.const(tensors[f"{name}.weight"]), g.const(tensors[f"{name}.bias"])
        return g.op("Conv", x, weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def rectify(x: str, name: str) -> str:
        return g.op("PRelu", x, constant(f"{name}.slope"))

    x = g.op("Mul", g.op("Sub", z, constant("mean")), constant("scale"))
    x = g.op("Clip", x, g.const(-REACH), g.const(REACH))
    return _layers(x, blocks, convolve, rectify, lambda a, b: g.op("Add", a, b))


def _layers(
    x: T,
    blocks: int,
    convolve: Callable[[T, str], T],
    rectify: Callable[[T, str], T],
    add: Callable[[T, T], T],
) -> T:
    """The network from the standardised map to 2K channels, in torch or as a graph."""
    h = rectify(convolve(x, "first"), "first")
    for i in range(blocks):
        inner = rectify(convolve(h, f"block{i}.in"), f"block{i}.in")
        h = add(h, convolve(inner, f"block{i}.out"))
    return convolve(rectify(convolve(h, "head"), "head"), "last")
