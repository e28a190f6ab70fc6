"""Reductions, cumulative sums, and the positions of the largest values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from posthoc.network.autograd.node import Node, Operator, Table, axes_of, ints

# (x, axes, keepdims) -> reduced; never called without axes
_Reduce = Callable[[Tensor, list[int], bool], Tensor]


def _dims(node: Node, x: Tensor, axes: Tensor | None) -> list[int]:
    """What is reduced: all axes where none is given, unless that is to mean none."""
    found = axes_of(node, axes, x.dim())
    if found:
        return found
    return [] if node.get("noop_with_empty_axes", 0) else list(range(x.dim()))


def _sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.sum(x, dims, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    count = math.prod(x.shape[d] for d in dims)
    total = _sum(x, dims, keep)
    return total / count if x.is_floating_point() else total // count


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keepdim=keep, dtype=x.dtype)
    return x


def _extreme(function: Callable[..., Tensor], largest: bool) -> _Reduce:
    """The largest or the smallest; of no values the other end of the type."""

    def run(x: Tensor, dims: list[int], keep: bool) -> Tensor:
        if all(x.shape[d] for d in dims):
            return function(x, dims, keepdim=keep)
        if x.is_floating_point():
            empty: float = -math.inf if largest else math.inf
        elif x.dtype == torch.bool:
            empty = not largest
        else:
            limits = torch.iinfo(x.dtype)
            empty = limits.min if largest else limits.max
        return x.new_full(_sum(x, dims, keep).shape, empty)

    return run


def _log_sum_exp(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, dims, keepdim=keep)


def _reduction(
    reduce: _Reduce,
    before: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[Tensor], Tensor] | None = None,
) -> Operator:
    """``before`` and ``after`` are applied even where nothing is reduced."""

    def run(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        dims = _dims(node, x, axes)
        y = x if before is None else before(x)
        y = reduce(y, dims, bool(node.get("keepdims", 1))) if dims else y
        return (y if after is None else after(y)).to(x.dtype)

    return Operator(run, host=(1,))


def _arg(largest: bool) -> Operator:
    """ArgMax, ArgMin: the first position, or the last."""

    def run(node: Node, x: Tensor) -> Tensor:
        axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
        function: Callable[..., Tensor] = torch.argmax if largest else torch.argmin
        if not node.get("select_last_index", 0):
            return function(x, axis, keepdim=keep)
        last: Tensor = x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)
        return last

    return Operator(run)


def top_k(node: Node, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """TopK: (values, positions); of equal values the earlier ones, which torch.topk does not
    promise."""
    axis, (count,) = node.get("axis", -1), ints(k)
    largest = bool(node.get("largest", 1))
    values, positions = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), positions.narrow(axis, 0, count)


def cumulative_sum(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    """CumSum, inclusive or not, from either end."""
    (dim,) = ints(axis)
    x = x.flip(dim) if node.get("reverse", 0) else x
    y = torch.cumsum(x, dim, dtype=x.dtype)
    if node.get("exclusive", 0):
        first = torch.zeros_like(y.narrow(dim, 0, min(1, y.shape[dim])))
        y = torch.cat([first, y.narrow(dim, 0, max(y.shape[dim] - 1, 0))], dim)
    return y.flip(dim) if node.get("reverse", 0) else y


OPERATORS: Table = {
    "ArgMax": _arg(largest=True),
    "ArgMin": _arg(largest=False),
    "CumSum": Operator(cumulative_sum, host=(1,)),
    "ReduceL1": _reduction(_sum, before=torch.abs),
    "ReduceL2": _reduction(_sum, before=torch.square, after=torch.sqrt),
    "ReduceLogSum": _reduction(_sum, after=torch.log),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(_extreme(torch.amax, largest=True)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_extreme(torch.amin, largest=False)),
    "ReduceProd": _reduction(_prod),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum, before=torch.square),
    "TopK": Operator(top_k, host=(1,)),
}
