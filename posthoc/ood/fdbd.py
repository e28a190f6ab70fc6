"""fDBD, the distance to the decision boundaries (Liu & Qin, ICML 2024, arXiv:2312.11536).

score = - mean over k != c of |z_c - z_k| / |w_c - w_k|, over |phi - mean|, with c the predicted
class: a row is strange that lies near to boundaries for its distance from the mean. The paper does
not negate it. A class whose row of W is that of c has no boundary with it and is left out of the
mean. The state holds C² numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State
from posthoc.ood import centred
from posthoc.ood.centred import Moments

INFO = Info(
    name="fdbd",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"features", "linear_head"}),
    summary="distance to the decision boundaries (fDBD)",
    paper=Paper(
        "Fast Decision Boundary based Out-of-Distribution Detector",
        2024,
        "https://arxiv.org/abs/2312.11536",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment
EQUAL = 1e-6  # rows of W nearer than this share of the longest are the same row


def init(n_classes: int, n_features: int) -> Moments:
    """No rows."""
    del n_classes
    return centred.empty(n_features)


def update(stats: Moments, batch: Features) -> Moments:
    """Add the features of a batch."""
    return centred.add(stats, batch, INFO.name)


def merge(a: Moments, b: Moments) -> Moments:
    """The sums of both."""
    return centred.join(a, b)


def finish(stats: Moments, head: LinearHead | None = None) -> State:
    """The mean, and for each class the weights C of its differences to the others.

    Raises FitError for no rows, constant features, no linear head, and one without boundaries.
    """
    mean, spread = centred.centre(stats, INFO.name)
    w = centred.head_of(head, INFO.name).weight
    apart = np.stack([np.sqrt(((w - row) ** 2).sum(1)) for row in w])
    known = apart > EQUAL * np.sqrt((w * w).sum(1).max())
    if not known.any():
        raise FitError("fdbd: the head says the same of every class; no boundary lies between them")
    weights = np.where(known, 1 / np.where(known, apart, 1.0), 0.0)
    weights /= np.maximum(known.sum(1, keepdims=True), 1)
    return State(
        {"mean": mean, "weights": weights},
        {"rows": stats.n, "least": centred.NEAREST * spread},
    )


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D and outputs N×C (float64 definition)."""
    t, logits = state.tensors, np.asarray(z, np.float64)
    ahead = logits.max(1, keepdims=True) - logits
    near = (ahead * t["weights"][logits.argmax(1)]).sum(1)
    return np.asarray(-near / centred.distance(phi, t["mean"], state.settings["least"]))


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    t = state.tensors
    label = g.op("ArgMax", z, axis=1, keepdims=0)
    behind = g.op("Sub", z, g.reduce("ReduceMax", z, 1, keepdims=True))
    weights = g.op("Gather", g.const(t["weights"]), label, axis=0)
    near = g.sum(g.op("Mul", behind, weights), 1)
    return g.op("Div", near, centred.emit_distance(g, phi, t["mean"], state.settings["least"]))
