"""Distance to the k-th nearest neighbour among features of length one (Sun et al., ICML 2022).

score = -cos of the angle between phi and the k-th nearest row of a bank (section 3 of the paper):
the distance of the two at length one is sqrt(2 + 2 score), which grows with it. It is not taken,
because for neighbours that nearly coincide 2 - 2 cos cancels in float32.

The bank is `posthoc.ood.sample` of the rows of the fit, at most 10,000: the graph holds it, and at
512 features it is 20 MB, read once a batch (bench: `python -m bench knn`). k is 50 as in the paper,
or one row in 20 of a bank of less than 1,000.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State
from posthoc.ood import sample
from posthoc.ood.neighbours import LEAST, kth_cosine, unit
from posthoc.ood.sample import Sample

INFO = Info(
    name="knn",
    kind="score",
    tasks=("classification", "regression"),
    needs=frozenset({"features"}),
    summary="distance to the 50th nearest neighbour among normalised features (KNN)",
    paper=Paper(
        "Out-of-Distribution Detection with Deep Nearest Neighbors",
        2022,
        "https://proceedings.mlr.press/v162/sun22d.html",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment
BANK = 10_000
K = 50
SHARE = 20  # of fewer rows than 50 times this, k is one in so many


def init(n_classes: int, n_features: int) -> Sample:
    """No rows."""
    del n_classes, n_features
    return sample.empty(BANK)


def update(stats: Sample, batch: Features) -> Sample:
    """Add the features of a batch; FitError for those that are not finite, or for none."""
    if batch.phi is None:
        raise FitError("knn needs features; this model is a black box")
    # Without outputs: nothing reads them.
    return sample.add(stats, Features(batch.phi, np.zeros((len(batch), 0))), "knn")


def merge(a: Sample, b: Sample) -> Sample:
    """The bank of both."""
    return sample.join(a, b)


def finish(stats: Sample, head: LinearHead | None = None) -> State:
    """The bank at length one.

    Raises FitError for fewer than two rows and for features that are constant over them.
    """
    del head
    if len(stats) < 2:
        raise FitError(f"knn needs at least two rows and has {len(stats)}")
    bank = unit(stats.phi).astype(np.float32)
    if not np.ptp(bank, axis=0).any():
        raise FitError("knn: every feature is constant on the given rows")
    k = min(K, max(1, len(bank) // SHARE))
    return State({"bank": bank}, {"k": k, "bank": len(bank), "rows": stats.seen})


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D, in [-1, 1] (float64 definition)."""
    del z
    return -kth_cosine(unit(np.asarray(phi)), state.tensors["bank"], state.settings["k"])


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del z
    assert phi is not None
    k = state.settings["k"]
    length = g.op("Sqrt", g.sum(g.op("Mul", phi, phi), 1, keepdims=True))
    x = g.op("Div", phi, g.op("Max", length, g.const(LEAST)))
    cosines = g.op("MatMul", x, g.const(state.tensors["bank"].T))
    nearest, _ = g.op2("TopK", cosines, g.const([k], "int64"), axis=1)
    kth = g.op("Gather", nearest, g.const(k - 1, "int64"), axis=1)
    return g.op("Neg", kth)
