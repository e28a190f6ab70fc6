"""Classes by falling probability: what adaptive, regularised and top-k scores have in common.

Equal probabilities stand in the order of their classes, here and in ONNX. Heads of near one are
written as one minus the tail, less the one: a rank does not see a constant, and float32 keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, I64, Array

if TYPE_CHECKING:
    from posthoc.graph import Fragment


@dataclass(frozen=True, slots=True)
class Ranked:
    """N×C, columns by falling probability: ``p``, the sum ``below`` each, their ``order``; ``u``
    N×1 and the ``ranks`` 1…C."""

    p: F64
    below: F64
    order: I64
    u: F64
    ranks: I64

    def scattered(self, scores: Array) -> F64:
        """Scores by rank as scores by class."""
        out = np.empty_like(self.p)
        np.put_along_axis(out, self.order, np.broadcast_to(scores, self.p.shape), 1)
        return out


def ranked(p: Array, u: Array | float) -> Ranked:
    """Probabilities N×C in their order; ``u`` a scalar or N."""
    p = np.asarray(p, np.float64)
    order = np.argsort(-p, axis=1, kind="stable")
    sorted_p = np.take_along_axis(p, order, 1)
    below = np.zeros_like(sorted_p)
    below[:, :-1] = np.cumsum(sorted_p[:, :0:-1], 1)[:, ::-1]
    column = np.broadcast_to(np.asarray(u, np.float64), len(p))[:, None]
    return Ranked(sorted_p, below, order, column, np.arange(1, p.shape[1] + 1))


@dataclass(frozen=True, slots=True)
class RankedNames:
    """`Ranked` as tensors of a graph; ``less`` is u - 1, N×1, None for u = 1."""

    p: str
    below: str
    less: str | None


def emit_ranked(
    g: Fragment, p: str, classes: int, u: str | None, make: Callable[[RankedNames], str]
) -> str:
    """Scores by class N×C of what ``make`` gives by rank."""
    sorted_p, order = g.op2("TopK", p, g.const([classes], "int64"), axis=-1)
    below = g.op("CumSum", sorted_p, g.const(1, "int64"), reverse=1, exclusive=1)
    less = None if u is None else g.unsqueeze(g.op("Sub", u, g.const(1.0)), 1)
    score = make(RankedNames(sorted_p, below, less))
    shape = g.op("Shape", order)
    whole = g.op("Expand", score, shape)
    return g.op("ScatterElements", g.op("Expand", g.const(0.0), shape), order, whole, axis=1)


def smallest(
    penalties: tuple[float, ...], scores: Callable[[float], F64], y: Array, alpha: float
) -> float:
    """The penalty whose sets are smallest on the mean, ranks and sizes taken on the same rows; the
    lesser of equals."""
    sizes = {}
    for penalty in penalties:
        s = scores(penalty)
        true = np.sort(s[np.arange(len(s)), y])
        q = true[min(len(true) - 1, int(np.ceil((len(true) + 1) * (1 - alpha))) - 1)]
        sizes[penalty] = float((s <= q).sum(1).mean())
    return min(sizes, key=lambda k: (sizes[k], k))
