"""Normalisation layers, and Dropout as it is in inference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from posthoc.network.autograd.node import Node, Operator, Table


def batch_norm(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """BatchNormalization with its running statistics, which may be of a wider type than x."""
    wide = torch.promote_types(x.dtype, mean.dtype)
    value, mean, variance, scale, bias = (t.to(wide) for t in (x, mean, variance, scale, bias))
    eps = node.get("epsilon", 1e-5)
    return functional.batch_norm(value, mean, variance, scale, bias, False, 0.0, eps).to(x.dtype)


def instance_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """InstanceNormalization: a group per channel."""
    return torch.group_norm(x, x.shape[1], scale, bias, node.get("epsilon", 1e-5))


def group_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """GroupNormalization; before opset 21 the affine parameters are per group."""
    groups = int(node.get("num_groups", 1))
    if node.opset < 21:
        scale, bias = (t.repeat_interleave(x.shape[1] // groups) for t in (scale, bias))
    return torch.group_norm(x, groups, scale, bias, node.get("epsilon", 1e-5))


def layer_norm(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """LayerNormalization: (result, mean, inverse standard deviation). The affine parameters may
    broadcast."""
    shape = x.shape[node.get("axis", -1) :]
    eps = node.get("epsilon", 1e-5)
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return tuple(torch.native_layer_norm(x, shape, scale, bias, eps))
    y, mean, inverse = torch.native_layer_norm(x, shape, None, None, eps)
    y = y * scale
    return (y if bias is None else y + bias), mean, inverse


def rms_norm(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    """RMSNormalization; half precision is normalised in float32 (its stash_type)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    axes = tuple(range(node.get("axis", -1) % x.dim(), x.dim()))
    value = x.to(wide)
    square = value.square().mean(axes, keepdim=True)
    return (value * torch.rsqrt(square + node.get("epsilon", 1e-5))).to(x.dtype) * scale


def lp_norm(node: Node, x: Tensor) -> Tensor:
    """LpNormalization; a row of zeros stays."""
    axis, order = node.get("axis", -1), node.get("p", 2)
    norm = torch.linalg.vector_norm(x, order, axis, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def local_response(node: Node, x: Tensor) -> Tensor:
    """LRN across ``size`` neighbouring channels."""
    size = int(node.get("size", 1))
    before, after = (size - 1) // 2, size // 2
    square = functional.pad(x.square().flatten(2), (0, 0, before, after))
    total = square.unfold(1, size, 1).sum(-1).reshape(x.shape)
    scale = node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * total
    return x / torch.pow(scale, node.get("beta", 0.75))


def dropout(node: Node, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dropout in inference: (x, a mask of ones), whatever its third input says."""
    return x, torch.ones_like(x, dtype=torch.bool)


def _trains(node: Node) -> bool:
    return bool(node.get("training_mode", 0)) or node.makes(1)


OPERATORS: Table = {
    "BatchNormalization": Operator(batch_norm, refuses=_trains),
    "Dropout": Operator(dropout, host=(1, 2)),
    "GroupNormalization": Operator(group_norm),
    "InstanceNormalization": Operator(instance_norm),
    "LayerNormalization": Operator(layer_norm),
    "LpNormalization": Operator(lp_norm),
    "LRN": Operator(local_response),
    "RMSNormalization": Operator(rms_norm),
}
