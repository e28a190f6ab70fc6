"""One minus the largest softmax probability: needs outputs only (Hendrycks & Gimpel, ICLR 2017).

1 - p of the largest class is the sum of the others, so that saturated rows keep their order in
float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, Info, LinearHead, Paper, State
from posthoc.links import softmax

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

if TYPE_CHECKING:
    from posthoc.graph import Fragment


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
    return State({}, {"classes": stats})


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their outputs N×C (float64 definition)."""
    del state, phi
    return np.asarray(np.sort(softmax(z), axis=1)[:, :-1].sum(1))


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del phi
    # The same nodes as the head's own mask of the label, so that the runtime merges the two.
    label = g.unsqueeze(g.op("ArgMax", z, axis=1, keepdims=0), 1)
    first = g.op("Equal", label, g.const(range(state.settings["classes"]), "int64"))
    return g.sum(g.op("Where", first, g.const(0.0), g.op("Softmax", z, axis=-1)), 1)
