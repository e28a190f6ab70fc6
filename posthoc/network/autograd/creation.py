"""Types, shapes and tensors that are made rather than computed.

What is made from shapes stays in main memory, so that a shape never waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posthoc.network.autograd.dtypes import DTYPES, array
from posthoc.network.autograd.node import Node, Operator, Table, ints


def cast(node: Node, x: Tensor) -> Tensor:
    """Cast."""
    return x.to(DTYPES[node.get("to", 0)])


def shape(node: Node, x: Tensor) -> Tensor:
    """Shape, or a part of it."""
    return torch.tensor(x.shape[node.get("start", 0) : node.get("end", None)], dtype=torch.int64)


def size(node: Node, x: Tensor) -> Tensor:
    """Size."""
    return torch.tensor(x.numel())


def constant_of_shape(node: Node, sizes: Tensor) -> Tensor:
    """ConstantOfShape; float32 zeros without a value."""
    value = node.get("value", None)
    if value is None:
        return torch.zeros(ints(sizes))
    return torch.full(ints(sizes), array(value).item(), dtype=DTYPES[value.data_type])


def count(node: Node, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    """Range."""
    a, b, c = start.item(), limit.item(), step.item()
    steps = torch.arange(max(math.ceil((b - a) / c), 0), device=start.device)
    return torch.mul(steps.to(start.dtype), c).add(a).to(start.dtype)


def eye_like(node: Node, x: Tensor) -> Tensor:
    """EyeLike: ones on the diagonal ``k``."""
    dtype = DTYPES[node.get("dtype", 0)] if "dtype" in node.attributes else x.dtype
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    return torch.eq(rows[:, None] + node.get("k", 0), columns).to(dtype)


def dequantise(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """DequantizeLinear: (x - zero) scale, per tensor, along an axis, or per block of one."""
    dtype = DTYPES[node.get("output_dtype", 0)] if node.get("output_dtype", 0) else scale.dtype
    axis, block = node.get("axis", 1), node.get("block_size", 0)

    def fitted(t: Tensor) -> Tensor:
        if block:
            return t.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
        return t.reshape(-1, *[1] * (x.dim() - 1 - axis % x.dim())) if t.numel() > 1 else t

    steps = x.to(scale.dtype) if zero is None else x.to(scale.dtype) - fitted(zero).to(scale.dtype)
    return (steps * fitted(scale)).to(dtype)


def _no_type(name: str) -> Operator:
    return Operator(cast, refuses=lambda node: node.get(name, 0) not in DTYPES)


def _unreadable(node: Node) -> bool:
    value = node.get("value", None)
    return value is not None and value.data_type not in DTYPES


OPERATORS: Table = {
    "Cast": _no_type("to"),
    "CastLike": Operator(lambda node, x, like: x.to(like.dtype), host=(1,)),
    "ConstantOfShape": Operator(constant_of_shape, host=(0,), refuses=_unreadable),
    "DequantizeLinear": Operator(
        dequantise, refuses=lambda node: node.get("output_dtype", 1) not in (0, *DTYPES)
    ),
    "EyeLike": Operator(eye_like, refuses=lambda node: node.get("dtype", 1) not in DTYPES),
    "Range": Operator(count, host=(0, 1, 2)),
    "Shape": Operator(shape, host=(0,)),
    "Size": Operator(size, host=(0,)),
}
