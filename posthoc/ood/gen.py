"""GEN, the generalised entropy of the softmax: needs outputs only (Liu et al., CVPR 2023).

score = sum over the M largest p of p^gamma (1 - p)^gamma, with gamma = 0.1 and M = 100. The paper
negates it; here larger is stranger. 1 - p of the largest class is the sum of the others, so that
saturated rows keep their order in float32; products below 1e-36 count as 1e-36.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, Info, LinearHead, Paper, State
from posthoc.links import softmax

INFO = Info(
    name="gen",
    kind="score",
    tasks=("classification",),
    needs=frozenset(),
    summary="generalised entropy of the softmax (GEN)",
    paper=Paper(
        "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection",
        2023,
        "https://openaccess.thecvf.com/content/CVPR2023/html/Liu_GEN_Pushing_the_Limits_of_Softmax-Based_Out-of-Distribution_Detection_CVPR_2023_paper.html",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment
GAMMA = 0.1
TOP = 100
# Float32 holds no smaller number well, and its tenth root would still count (2.5e-4 a class).
LEAST = 1e-36


def init(n_classes: int, n_features: int) -> int:
    """Nothing is fitted but the number of classes."""
    del n_features
    return n_classes


def update(stats: int, batch: Features) -> int:
    """Nothing to add."""
    del batch
    return stats


def merge(a: int, b: int) -> int:
    """The same number of classes."""
    del b
    return a


def finish(stats: int, head: LinearHead | None = None) -> State:
    """The settings of the score."""
    del head
    return State({}, {"gamma": GAMMA, "top": min(TOP, stats), "classes": stats})


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their outputs N×C (float64 definition)."""
    del phi
    p = -np.sort(-softmax(z), axis=1)
    rest = 1.0 - p
    rest[:, 0] = p[:, 1:].sum(1)
    p, rest = p[:, : state.settings["top"]], rest[:, : state.settings["top"]]
    return np.asarray((np.maximum(p * rest, LEAST) ** state.settings["gamma"]).sum(1))


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del phi
    p = g.op("Softmax", z, axis=-1)
    classes, top = state.settings["classes"], state.settings["top"]
    # The same nodes as the head's own mask of the label, so that the runtime merges the two.
    label = g.unsqueeze(g.op("ArgMax", z, axis=1, keepdims=0), 1)
    first = g.op("Equal", label, g.const(range(classes), "int64"))
    others = g.sum(g.op("Where", first, g.const(0.0), p), 1, keepdims=True)
    if top == classes:
        rest = g.op("Where", first, others, g.op("Sub", g.const(1.0), p))
    else:
        p, _ = g.op2("TopK", p, g.const([top], "int64"), axis=-1)
        bounds = (g.const([1], "int64"), g.const([top], "int64"), g.const([1], "int64"))
        tail = g.op("Sub", g.const(1.0), g.op("Slice", p, *bounds))
        rest = g.op("Concat", others, tail, axis=1)
    product = g.op("Max", g.op("Mul", p, rest), g.const(LEAST))
    term = g.op("Pow", product, g.const(state.settings["gamma"]))
    return g.sum(term, 1)
