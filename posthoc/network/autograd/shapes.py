"""Operators that move values about."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posthoc.network.autograd.node import Node, Operator, Table, axes_of, ints


def reshape(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    """Reshape; 0 keeps the axis unless ``allowzero``, -1 takes what is left."""
    sizes = ints(shape)
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    if -1 in sizes and x.numel() == 0:  # torch finds -1 ambiguous then
        known = math.prod(s for s in sizes if s != -1)
        sizes = [0 if s == -1 and known else s for s in sizes]
    return x.reshape(sizes)


def flatten(node: Node, x: Tensor) -> Tensor:
    """Flatten to two axes."""
    axis = node.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def transpose(node: Node, x: Tensor) -> Tensor:
    """Transpose; without ``perm`` the axes are reversed."""
    return x.permute(node.get("perm", list(range(x.dim()))[::-1]))


def squeeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Squeeze the axes, or all of length one."""
    found = axes_of(node, axes, x.dim())
    return x.squeeze() if found is None else x.squeeze(tuple(found))


def unsqueeze(node: Node, x: Tensor, axes: Tensor) -> Tensor:
    """Unsqueeze: the axes are positions in the result."""
    for axis in sorted(axes_of(node, axes, x.dim() + axes.numel()) or ()):
        x = x.unsqueeze(axis)
    return x


def concat(node: Node, *xs: Tensor) -> Tensor:
    """Concat."""
    return torch.cat(xs, node.get("axis", 0))


def split(node: Node, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split to the given sizes, or to equal parts of which the last may be smaller."""
    axis = node.get("axis", 0)
    if sizes is not None:
        return torch.split(x, ints(sizes), axis)
    length, parts = x.shape[axis], len(node.outputs)
    size = -(-length // parts)
    rest = [min(size, max(length - i * size, 0)) for i in range(parts)]
    return torch.split(x, rest, axis)


def expand(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    """Expand: both shapes broadcast."""
    wanted = ints(shape)
    rank = max(x.dim(), len(wanted))
    own = [1] * (rank - x.dim()) + list(x.shape)
    wanted = [1] * (rank - len(wanted)) + wanted
    return x.expand([a if b == 1 else b for a, b in zip(own, wanted, strict=True)])


def tile(node: Node, x: Tensor, repeats: Tensor) -> Tensor:
    """Tile."""
    return x.repeat(ints(repeats))


def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """DepthToSpace: channels to blocks of pixels, in the order DCR or CRD."""
    (n, c, h, w), b = x.shape, int(node.get("blocksize", 1))
    if node.get("mode", "DCR") == "DCR":
        y = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // b**2, h * b, w * b)


def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """SpaceToDepth: blocks of pixels to channels."""
    (n, c, h, w), b = x.shape, int(node.get("blocksize", 1))
    y = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if node.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return y.permute(order).reshape(n, c * b * b, h // b, w // b)


def pad(
    node: Node, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """Pad in every mode, axis by axis; negative pads cut values off first.

    Otherwise than by a constant, the result takes x at positions beyond the axis, which are brought
    back into it: held at its ends (edge), modulo its length (wrap), or mirrored (reflect).
    """
    mode, numbers = node.get("mode", "constant"), ints(pads)
    dims = axes_of(node, axes, x.dim()) or list(range(x.dim()))
    for dim, before, after in zip(dims, numbers[: len(dims)], numbers[len(dims) :], strict=True):
        cut = max(-before, 0)
        x = x.narrow(dim, cut, x.shape[dim] - cut - max(-after, 0))
        before, after = max(before, 0), max(after, 0)
        if not before and not after:
            continue
        if mode == "constant":
            x = _filled(x, dim, before, after, 0 if value is None else value.item())
            continue
        length = x.shape[dim]
        at = torch.arange(-before, length + after, device=x.device)
        if mode == "edge":
            at = at.clamp(0, length - 1)
        elif mode == "wrap":
            at = at % length
        else:
            at = (at % max(2 * (length - 1), 1) - (length - 1)).abs().neg() + length - 1
        x = x.index_select(dim, at)
    return x


def _filled(x: Tensor, dim: int, before: int, after: int, value: float) -> Tensor:
    def block(count: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = count
        return x.new_full(shape, value)

    return torch.cat([block(before), x, block(after)], dim)


def triangle(node: Node, x: Tensor, k: Tensor | None = None) -> Tensor:
    """Trilu: the upper or the lower triangle."""
    offset = 0 if k is None else ints(k)[0]
    return torch.triu(x, offset) if node.get("upper", 1) else torch.tril(x, offset)


OPERATORS: Table = {
    "Concat": Operator(concat),
    "DepthToSpace": Operator(depth_to_space),
    "Expand": Operator(expand, host=(1,)),
    "Flatten": Operator(flatten),
    "Identity": Operator(lambda node, x: x),
    "Pad": Operator(
        pad,
        host=(1, 2, 3),
        refuses=lambda n: n.get("mode", "constant") not in ("constant", "reflect", "edge", "wrap"),
    ),
    "Reshape": Operator(reshape, host=(1,)),
    "SpaceToDepth": Operator(space_to_depth),
    "Split": Operator(split, host=(1,)),
    "Squeeze": Operator(squeeze, host=(1,)),
    "Tile": Operator(tile, host=(1,)),
    "Transpose": Operator(transpose),
    "Trilu": Operator(triangle, host=(1,)),
    "Unsqueeze": Operator(unsqueeze, host=(1,)),
}
