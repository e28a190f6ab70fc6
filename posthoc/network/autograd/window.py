"""Sliding windows: where they lie, by ONNX's pads, auto_pad and ceil_mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from posthoc.contract import ModelError
from posthoc.network.autograd.node import Node


@dataclass(frozen=True, slots=True)
class Window:
    """One value per spatial axis. ``extent`` is what the window spans: (kernel-1)·dilation + 1."""

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    begin: list[int]
    end: list[int]

    @property
    def extent(self) -> list[int]:
        """What the window spans."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]


def halves(total: int, lower: bool) -> tuple[int, int]:
    """Padding before and after; the odd one goes to the end, or to the front of SAME_LOWER."""
    small, large = total // 2, total - total // 2
    return (large, small) if lower else (small, large)


def window(node: Node, size: Sequence[int], kernel: Sequence[int]) -> Window:
    """The windows of a node over ``size`` values per spatial axis, without ceil_mode."""
    n = len(size)
    found = Window(
        list(kernel),
        node.get("strides", [1] * n),
        node.get("dilations", [1] * n),
        *_explicit(node, n),
    )
    auto = node.get("auto_pad", "NOTSET")
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        return found
    for i, (length, stride, extent) in enumerate(
        zip(size, found.stride, found.extent, strict=True)
    ):
        total = max((-(-length // stride) - 1) * stride + extent - length, 0)
        found.begin[i], found.end[i] = halves(total, auto == "SAME_LOWER")
    return found


def ceiled(w: Window, size: Sequence[int]) -> list[int]:
    """Padding at the end with which ceil_mode's last windows fit. A window that would start in
    that padding is left out."""
    end = []
    for length, stride, extent, before, after in zip(
        size, w.stride, w.extent, w.begin, w.end, strict=True
    ):
        count = -(-(length + before + after - extent) // stride) + 1
        if (count - 1) * stride >= length + before:
            count -= 1
        end.append((count - 1) * stride + extent - length - before)
    return end


def padded(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    """``x`` with that many further values around its last axes; fewer where negative."""
    if not any(begin) and not any(end):
        return x
    pairs = zip(reversed(begin), reversed(end), strict=True)
    return functional.pad(x, [p for pair in pairs for p in pair], value=value)


def spatial(functions: Mapping[int, Callable[..., Tensor]], x: Tensor) -> Callable[..., Tensor]:
    """Torch's function for as many axes as ``x`` has after its channels."""
    if x.dim() - 2 not in functions:
        raise ModelError(f"windows over {x.dim() - 2} axes: torch has them over 1, 2 and 3")
    return functions[x.dim() - 2]


def _explicit(node: Node, n: int) -> tuple[list[int], list[int]]:
    if node.get("auto_pad", "NOTSET") != "NOTSET":
        return [0] * n, [0] * n
    pads = node.get("pads", [0] * (2 * n))
    return list(pads[:n]), list(pads[n:])
