"""NCI, the collapse of features onto class weights (Liu & Qin, CVPR 2025, arXiv:2311.01479).

score = - <w_c, phi - mean> / |phi - mean| - lambda |phi|_1, with c the predicted class and
lambda = 1e-4, which the paper chooses for each model on strange rows and negates nothing. Since
z = W phi + b, the product is z_c - (W mean + b)_c: no row of W is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, Info, LinearHead, Paper, State
from posthoc.ood import centred
from posthoc.ood.centred import Moments
from posthoc.ood.gaussian import exact

INFO = Info(
    name="nci",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"features", "linear_head"}),
    summary="features along the predicted class's weights (NCI)",
    paper=Paper(
        "Detecting Out-of-distribution through the Lens of Neural Collapse",
        2025,
        "https://arxiv.org/abs/2311.01479",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment
LAMBDA = 1e-4


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
    """The mean D and what the head says of it, C.

    Raises FitError for no rows, constant features and no linear head.
    """
    mean, spread = centred.centre(stats, INFO.name)
    known = centred.head_of(head, INFO.name)
    return State(
        {"mean": mean, "middle": exact(known.weight @ mean + known.bias)},
        {"rows": stats.n, "least": centred.NEAREST * spread, "lambda": LAMBDA},
    )


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D and outputs N×C (float64 definition)."""
    t, s, logits = state.tensors, state.settings, np.asarray(z, np.float64)
    along = logits.max(1) - t["middle"][logits.argmax(1)]
    size = np.abs(np.asarray(phi, np.float64)).sum(1)
    return np.asarray(-along / centred.distance(phi, t["mean"], s["least"]) - s["lambda"] * size)


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    assert phi is not None
    t, s = state.tensors, state.settings
    label = g.op("ArgMax", z, axis=1, keepdims=0)
    middle = g.op("Gather", g.const(t["middle"]), label, axis=0)
    against = g.op("Sub", middle, g.reduce("ReduceMax", z, 1))
    cosine = g.op("Div", against, centred.emit_distance(g, phi, t["mean"], s["least"]))
    size = g.op("Mul", g.sum(g.op("Abs", phi), 1), g.const(s["lambda"]))
    return g.op("Sub", cosine, size)
