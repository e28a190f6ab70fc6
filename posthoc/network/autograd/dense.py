"""Products and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from posthoc.network.autograd.node import Node, Operator, Table, plain
from posthoc.network.autograd.window import halves, padded, spatial, window

_CONV: Mapping[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Gemm: alpha A' B' + beta C."""
    a = a.T if node.get("transA", 0) else a
    b = b.T if node.get("transB", 0) else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    y = a @ b
    y = y if alpha == 1 else alpha * y
    if c is None or beta == 0:
        return y
    return y + (c if beta == 1 else beta * c)


def einsum(node: Node, *inputs: Tensor) -> Tensor:
    """Einsum."""
    return torch.einsum(node.get("equation", ""), *inputs)


def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Conv over one, two or three axes."""
    w = window(node, x.shape[2:], weight.shape[2:])
    padding = w.begin
    if w.begin != w.end:
        x, padding = padded(x, w.begin, w.end), [0] * len(w.begin)
    function = spatial(_CONV, x)
    return function(x, weight, bias, w.stride, padding, w.dilation, node.get("group", 1))


def conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """ConvTranspose over one, two or three axes.

    Made whole, then cut or filled up with zeros to the size that is asked for: torch knows equal
    padding on both sides only.
    """
    n = x.dim() - 2
    w = window(node, x.shape[2:], weight.shape[2:])
    extra = node.get("output_padding", [0] * n)
    auto = node.get("auto_pad", "NOTSET")
    full = [(s - 1) * t + e for s, t, e in zip(x.shape[2:], w.stride, w.extent, strict=True)]
    if "output_shape" in node.attributes:
        wanted = list(node.get("output_shape", None))[-n:]
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [s * t for s, t in zip(x.shape[2:], w.stride, strict=True)]
    else:
        wanted = None
    if wanted is None:
        begin = w.begin
        wanted = [f + e - b - a for f, e, b, a in zip(full, extra, begin, w.end, strict=True)]
    else:
        begin = [
            halves(max(f + e - size, 0), auto != "SAME_UPPER")[0]
            for f, e, size in zip(full, extra, wanted, strict=True)
        ]
    function = spatial(_TRANSPOSED, x)
    y = function(x, weight, None, w.stride, 0, 0, node.get("group", 1), w.dilation)
    end = [size - (f - b) for size, f, b in zip(wanted, full, begin, strict=True)]
    y = padded(y, [-b for b in begin], end)
    return y if bias is None else y + bias.reshape(-1, *[1] * n)


OPERATORS: Table = {
    "Conv": Operator(conv),
    "ConvTranspose": Operator(conv_transpose),
    "Einsum": Operator(einsum),
    "Gemm": Operator(gemm),
    "MatMul": plain(torch.matmul),
}
