"""Values taken from, or put at, positions. A negative position counts from the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from posthoc.network.autograd.node import Node, Operator, Table, ints

_OPEN = (2**31 - 1, 2**63 - 1)
_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _positions(index: Tensor, length: int) -> Tensor:
    index = index.long()
    return torch.where(index < 0, index + length, index)


def _slice(length: int, start: int, end: int, step: int) -> range:
    """Positions of a slice. Backwards from before the first value it takes the first, other than
    in Python; and the largest integer leaves the end open backwards too, as in ONNX Runtime."""
    start, end = (v + length if v < 0 else v for v in (start, end))
    if step > 0:
        return range(min(max(start, 0), length), min(max(end, 0), length), step)
    end = -1 if end in _OPEN else min(max(end, -1), length - 1)
    return range(max(min(start, length - 1), 0) if length else -1, end, step)


def cut(
    node: Node,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Slice."""
    first, last = ints(starts), ints(ends)
    dims = list(range(len(first))) if axes is None else ints(axes)
    strides = [1] * len(first) if steps is None else ints(steps)
    for dim, start, end, step in zip(dims, first, last, strides, strict=True):
        taken = _slice(x.shape[dim], start, end, step)
        if step > 0:
            x = x[(slice(None),) * (dim % x.dim()) + (slice(taken.start, taken.stop, step),)]
        else:
            x = x.index_select(dim, torch.tensor(list(taken), dtype=torch.int64, device=x.device))
    return x


def gather(node: Node, x: Tensor, index: Tensor) -> Tensor:
    """Gather along one axis."""
    axis = node.get("axis", 0) % x.dim()
    at = _positions(index, x.shape[axis])
    y = x.index_select(axis, at.reshape(-1))
    return y.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def gather_elements(node: Node, x: Tensor, index: Tensor) -> Tensor:
    """GatherElements."""
    axis = node.get("axis", 0)
    return torch.gather(x, axis, _positions(index, x.shape[axis]))


def _rows(index: Tensor, sizes: Sequence[int]) -> Tensor:
    """The number of the entry that each last axis of ``index`` names, among prod(sizes)."""
    number = torch.zeros(index.shape[:-1], dtype=torch.int64, device=index.device)
    for i, size in enumerate(sizes):
        number = number * size + _positions(index[..., i], size)
    return number


def gather_nd(node: Node, x: Tensor, index: Tensor) -> Tensor:
    """GatherND."""
    b, k = node.get("batch_dims", 0), index.shape[-1]
    batch, sizes, rest = x.shape[:b], x.shape[b : b + k], x.shape[b + k :]
    n = math.prod(batch)
    at = _rows(index, sizes).reshape(n, -1)
    rows = x.reshape(n, math.prod(sizes), *rest)
    y = rows[torch.arange(n, device=x.device)[:, None], at]
    return y.reshape((*index.shape[:-1], *rest))


def _scattered(x: Tensor, axis: int, at: Tensor, updates: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return x.scatter(axis, at, updates)
    return x.scatter_reduce(axis, at, updates, _REDUCE[reduction])


def scatter_elements(node: Node, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """ScatterElements."""
    axis = node.get("axis", 0)
    at = _positions(index, x.shape[axis])
    return _scattered(x, axis, at, updates, node.get("reduction", "none"))


def scatter_nd(node: Node, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """ScatterND."""
    k = index.shape[-1]
    width = math.prod(x.shape[k:])
    at = _rows(index, x.shape[:k]).reshape(-1, 1).expand(-1, width)
    rows, new = x.reshape(math.prod(x.shape[:k]), width), updates.reshape(at.shape)
    return _scattered(rows, 0, at, new, node.get("reduction", "none")).reshape(x.shape)


def one_hot(node: Node, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """OneHot: ``values`` are (off, on); a position outside the depth has no one."""
    size = int(depth.item())
    axis = node.get("axis", -1) % (index.dim() + 1)
    at = _positions(index, size).unsqueeze(axis)
    along = torch.arange(size, device=index.device)
    hot = at == along.reshape(size, *[1] * (index.dim() - axis))
    return torch.where(hot, values[1], values[0])


def non_zero(node: Node, x: Tensor) -> Tensor:
    """NonZero: one column of positions per value."""
    return torch.nonzero(x).T


OPERATORS: Table = {
    "Gather": Operator(gather),
    "GatherElements": Operator(gather_elements),
    "GatherND": Operator(gather_nd),
    "NonZero": Operator(non_zero),
    "OneHot": Operator(one_hot, host=(1,)),
    "ScatterElements": Operator(scatter_elements),
    "ScatterND": Operator(scatter_nd),
    "Slice": Operator(cut, host=(1, 2, 3, 4)),
}
