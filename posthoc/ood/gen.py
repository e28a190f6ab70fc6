"""GEN, the generalised entropy of the softmax: needs outputs only (Liu et al., CVPR 2023).

score = sum over the M largest p of p^gamma (1 - p)^gamma, with gamma = 0.1 and M = 100. The paper
negates it; here larger is stranger. 1 - p of the largest class is the sum of the others, so that
saturated rows keep their order in float32; products below 1e-36 count as 1e-36.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Info, LinearHead, Paper, State
from posthoc.links import softmax
from posthoc.ood.softmax import emit_others, init, merge, others, update

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

__all__ = ["INFO", "emit", "finish", "init", "merge", "score", "update"]

if TYPE_CHECKING:
    from posthoc.graph import Fragment
GAMMA = 0.1
TOP = 100
# Float32 holds no smaller number well, and its tenth root would still count (2.5e-4 a class).
LEAST = 1e-36


def finish(stats: int, head: LinearHead | None = None) -> State:
    """The settings of the score."""
    del head
    return State({}, {"gamma": GAMMA, "top": min(TOP, stats), "classes": stats})


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their outputs N×C (float64 definition)."""
    del phi
    p = -np.sort(-softmax(z), axis=1)
    rest = 1.0 - p
    rest[:, 0] = others(p)
    p, rest = p[:, : state.settings["top"]], rest[:, : state.settings["top"]]
    return np.asarray((np.maximum(p * rest, LEAST) ** state.settings["gamma"]).sum(1))


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del phi
    classes, top = state.settings["classes"], state.settings["top"]
    p, first, beside = emit_others(g, z, classes)
    if top == classes:
        rest = g.op("Where", first, beside, g.op("Sub", g.const(1.0), p))
    else:
        p, _ = g.op2("TopK", p, g.const([top], "int64"), axis=-1)
        bounds = (g.const([1], "int64"), g.const([top], "int64"), g.const([1], "int64"))
        tail = g.op("Sub", g.const(1.0), g.op("Slice", p, *bounds))
        rest = g.op("Concat", beside, tail, axis=1)
    product = g.op("Max", g.op("Mul", p, rest), g.const(LEAST))
    term = g.op("Pow", product, g.const(state.settings["gamma"]))
    return g.sum(term, 1)
