"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from posthoc.network.autograd.node import Node, Operator, Table
from posthoc.network.autograd.window import ceiled, padded, spatial, window

_Functions = Mapping[int, Callable[..., Tensor]]
_MAX: _Functions = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_MEAN: _Functions = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_CONV: _Functions = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def max_pool(node: Node, x: Tensor) -> Tensor:
    """MaxPool, padded with -inf (integers by way of float64, which holds them)."""
    size = x.shape[2:]
    w = window(node, size, node.get("kernel_shape", None))
    end = ceiled(w, size) if node.get("ceil_mode", 0) else w.end
    values = x if x.is_floating_point() else x.double()
    values = padded(values, w.begin, end, -math.inf)
    y = spatial(_MAX, x)(values, w.kernel, w.stride, 0, w.dilation)
    return y.to(x.dtype)


def average_pool(node: Node, x: Tensor) -> Tensor:
    """AveragePool: over the values in the window, with count_include_pad over its padding too,
    never over what ceil_mode adds."""
    size = x.shape[2:]
    w = window(node, size, node.get("kernel_shape", None))
    end = ceiled(w, size) if node.get("ceil_mode", 0) else w.end
    whole = padded(x, w.begin, end)
    mean = _mean(x, w.kernel, w.stride, w.dilation)
    y = mean(whole)
    if not any(w.begin) and all(e <= 0 for e in end):
        return y
    counted = x.new_ones((1, 1, *size))
    if node.get("count_include_pad", 0):
        counted = padded(counted, w.begin, w.end, 1.0)
        rest = [e - given for e, given in zip(end, w.end, strict=True)]
        counted = padded(counted, [0] * len(end), rest)
    else:
        counted = padded(counted, w.begin, end)
    return y / mean(counted)


def _mean(
    x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]
) -> Callable[[Tensor], Tensor]:
    """The mean over windows; torch has no dilated one, so that is a convolution per channel."""
    if all(d == 1 for d in dilation):
        pool = spatial(_MEAN, x)
        return lambda values: pool(values, kernel, stride)
    conv, weight = spatial(_CONV, x), x.new_full((1, 1, *kernel), 1 / math.prod(kernel))

    def mean(values: Tensor) -> Tensor:
        rows = conv(values.flatten(0, 1)[:, None], weight, None, stride, 0, dilation)
        return rows.reshape(*values.shape[:2], *rows.shape[2:])

    return mean


def global_average(node: Node, x: Tensor) -> Tensor:
    """GlobalAveragePool."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x


def global_max(node: Node, x: Tensor) -> Tensor:
    """GlobalMaxPool."""
    return torch.amax(x, tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x


OPERATORS: Table = {
    "AveragePool": Operator(average_pool),
    "GlobalAveragePool": Operator(global_average),
    "GlobalMaxPool": Operator(global_max),
    # The second output numbers positions, which nothing but MaxUnpool reads.
    "MaxPool": Operator(max_pool, refuses=lambda node: node.makes(1)),
}
