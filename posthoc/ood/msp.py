"""One minus the largest softmax probability: needs outputs only (Hendrycks & Gimpel, ICLR 2017).

1 - p of the largest class is the sum of the others, so that saturated rows keep their order in
float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Info, LinearHead, Paper, State
from posthoc.links import softmax
from posthoc.ood.softmax import emit_others, init, merge, others, update

INFO = Info(
    name="msp",
    kind="score",
    tasks=("classification",),
    needs=frozenset(),
    summary="one minus the largest softmax probability",
    paper=Paper(
        "A Baseline for Detecting Misclassified and Out-of-Distribution Examples "
        "in Neural Networks",
        2017,
        "https://arxiv.org/abs/1610.02136",
    ),
)

__all__ = ["INFO", "emit", "finish", "init", "merge", "score", "update"]

if TYPE_CHECKING:
    from posthoc.graph import Fragment


def finish(stats: int, head: LinearHead | None = None) -> State:
    """The settings of the score."""
    del head
    return State({}, {"classes": stats})


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their outputs N×C (float64 definition)."""
    del state, phi
    return others(-np.sort(-softmax(z), axis=1))


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del phi
    _, _, beside = emit_others(g, z, state.settings["classes"])
    return g.op("Squeeze", beside, g.const([1], "int64"))
