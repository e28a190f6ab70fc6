"""Resize and GridSample: values between pixels.

Resize works axis by axis. Along one, each result is a weighted sum of a few values (taps), whose
positions and weights follow the operator's definition: torch's own interpolation has some of its
coordinate modes only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from posthoc.contract import F64, I64
from posthoc.network.autograd.node import Node, Operator, Table, axes_of, ints

_F32 = NDArray[np.float32]
# float32 throughout, as ONNX Runtime and torch compute: at ties a pixel more or less hangs on it
_ONE, _HALF = np.float32(1), np.float32(0.5)


def _half_pixel(at: _F32, size: int, out: int, scale: np.float32) -> _F32:
    return (at + _HALF) / scale - _HALF


def _symmetric(at: _F32, size: int, out: int, scale: np.float32) -> _F32:
    adjusted = np.float32(out) / (scale * np.float32(size))
    offset = np.float32(size) / np.float32(2) * (_ONE - adjusted)
    return offset + _half_pixel(at, size, out, scale)


def _pytorch(at: _F32, size: int, out: int, scale: np.float32) -> _F32:
    return _half_pixel(at, size, out, scale) if out > 1 else np.zeros_like(at)


def _corners(at: _F32, size: int, out: int, scale: np.float32) -> _F32:
    return at * np.float32(size - 1) / np.float32(out - 1) if out > 1 else np.zeros_like(at)


def _asymmetric(at: _F32, size: int, out: int, scale: np.float32) -> _F32:
    return at / scale


_COORDINATES: dict[str, Callable[[_F32, int, int, np.float32], _F32]] = {
    "align_corners": _corners,
    "asymmetric": _asymmetric,
    "half_pixel": _half_pixel,
    "half_pixel_symmetric": _symmetric,
    "pytorch_half_pixel": _pytorch,
}
_NEAREST: dict[str, Callable[[_F32], _F32]] = {
    "ceil": np.ceil,
    "floor": np.floor,
    "round_prefer_ceil": lambda at: np.floor(at + _HALF),
    "round_prefer_floor": lambda at: np.ceil(at - _HALF),
}


def _linear(distance: F64, a: float) -> F64:
    return np.asarray(np.maximum(1 - np.abs(distance), 0))


def _cubic(distance: F64, a: float) -> F64:
    """The cubic convolution kernel of Keys (1981)."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.asarray(np.where(d <= 1, near, np.where(d < 2, far, 0.0)))


_KERNELS: dict[str, tuple[Callable[[F64, float], F64], int]] = {
    "linear": (_linear, 1),
    "cubic": (_cubic, 2),
}


def _taps(node: Node, size: int, out: int, scale: float) -> tuple[I64, F64]:
    """(positions, weights), out×taps each, along one axis."""
    where = _COORDINATES[node.get("coordinate_transformation_mode", "half_pixel")]
    at = where(np.arange(out, dtype=np.float32), size, out, np.float32(scale))
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        nearest = _NEAREST[node.get("nearest_mode", "round_prefer_floor")](at)
        positions = nearest[:, None].astype(np.int64)
        return np.clip(positions, 0, size - 1), np.ones(positions.shape)
    kernel, reach = _KERNELS[mode]
    shrink = min(float(scale), 1.0) if node.get("antialias", 0) else 1.0
    width = int(np.ceil(reach / shrink))
    positions = np.floor(at)[:, None].astype(np.int64) + np.arange(1 - width, width + 1)
    distance: F64 = np.multiply(positions - at[:, None], shrink, dtype=np.float64)
    weights = kernel(distance, node.get("cubic_coeff_a", -0.75))
    if node.get("exclude_outside", 0):
        weights = np.where((positions >= 0) & (positions < size), weights, 0.0)
    weights = weights / weights.sum(1, keepdims=True)
    return np.clip(positions, 0, size - 1), weights


def _sizes(
    node: Node, given: list[int], scales: Tensor | None, sizes: Tensor | None
) -> tuple[list[int], list[float]]:
    """(sizes, scales) of the resized axes, whose sizes are ``given``."""
    if scales is not None and scales.numel():
        factors = [float(np.float32(s)) for s in scales.tolist()]
        return [int(np.floor(g * f)) for g, f in zip(given, factors, strict=True)], factors
    assert sizes is not None
    wanted = ints(sizes)
    ratios = [w / g for w, g in zip(wanted, given, strict=True)]
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return wanted, ratios
    ratio = (min if policy == "not_larger" else max)(ratios)
    return [int(np.floor(ratio * g + 0.5)) for g in given], [ratio] * len(given)


def resize(
    node: Node,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Resize by scales or to sizes: nearest, linear, cubic, the two last with antialias too."""
    dims = axes_of(node, None, x.dim()) or list(range(x.dim()))
    wanted, factors = _sizes(node, [x.shape[d] for d in dims], scales, sizes)
    y = x if x.is_floating_point() else x.float()
    for dim, out, factor in zip(dims, wanted, factors, strict=True):
        if out == x.shape[dim] and factor == 1:
            continue
        positions, weights = _taps(node, x.shape[dim], out, factor)
        index = torch.from_numpy(positions).to(x.device)
        if weights.shape[1] == 1:
            y = y.index_select(dim, index[:, 0])
            continue
        share = torch.from_numpy(weights).to(y).T.reshape(-1, out, *[1] * (y.dim() - 1 - dim))
        taken = [y.index_select(dim, index[:, k]) * share[k] for k in range(len(share))]
        y = reduce(torch.add, taken)
    return y.to(x.dtype)


def _unusual(node: Node) -> bool:
    """tf_crop_and_resize, which no torch export writes."""
    return node.get("coordinate_transformation_mode", "half_pixel") not in _COORDINATES


_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def grid_sample(node: Node, x: Tensor, grid: Tensor) -> Tensor:
    """GridSample over two or three axes."""
    mode = node.get("mode", "linear")
    return functional.grid_sample(
        x,
        grid,
        _GRID_MODES.get(mode, mode),
        node.get("padding_mode", "zeros"),
        bool(node.get("align_corners", 0)),
    )


OPERATORS: Table = {
    "GridSample": Operator(grid_sample),
    "Resize": Operator(resize, host=(1, 2, 3), refuses=_unusual),
}
