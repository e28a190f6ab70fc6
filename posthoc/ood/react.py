"""ReAct: the energy after activations are clipped from above (Sun, Guo & Li, NeurIPS 2021).

score = -logsumexp(W min(phi, c) + b), with c the 90th percentile of all activations of
in-distribution rows. It is exact up to ROWS rows and that of a sample of ROWS beyond. With c
infinite the score is the energy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State
from posthoc.ood import outputs, sample
from posthoc.ood.sample import Sample

INFO = Info(
    name="react",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"features", "linear_head"}),
    summary="energy after activations are clipped (ReAct)",
    paper=Paper(
        "ReAct: Out-of-distribution Detection With Rectified Activations",
        2021,
        "https://arxiv.org/abs/2111.12797",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment
PERCENTILE = 90.0
# However alike the activations of a row are, the percentile of so many rows has an error with a
# standard deviation of at most 0.3 points.
ROWS = 10_000


def init(n_classes: int, n_features: int) -> Sample:
    """No rows."""
    del n_classes, n_features
    return sample.empty(ROWS)


def update(stats: Sample, batch: Features) -> Sample:
    """Add the features of a batch. Raises FitError without any, and where they are not finite."""
    if batch.phi is None:
        raise FitError("react needs features; the model is a black box")
    return sample.add(stats, Features(batch.phi, batch.z[:, :0]), INFO.name)


def merge(a: Sample, b: Sample) -> Sample:
    """The sample of both."""
    return sample.join(a, b)


def finish(stats: Sample, head: LinearHead | None = None) -> State:
    """The clipping value and the head.

    Raises FitError without a linear head, for fewer than two rows, or for constant features.
    """
    linear = outputs.head_of(head, INFO.name)
    if len(stats) < 2:
        raise FitError(f"react needs at least two rows and has {len(stats)}")
    phi = np.asarray(stats.phi, np.float64)
    if (phi == phi[0]).all():
        raise FitError("react: every feature is constant on the given rows")
    clip = np.percentile(phi, PERCENTILE)
    return State(
        {"clip": np.asarray(clip), "weight": linear.weight, "bias": linear.bias},
        {"percentile": PERCENTILE, "clip": float(clip), "rows": stats.seen, "read": len(stats)},
    )


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D (float64 definition)."""
    del z
    t = state.tensors
    clipped = np.minimum(np.asarray(phi, np.float64), t["clip"])
    return outputs.energy(clipped @ t["weight"].T + t["bias"])


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del z
    assert phi is not None
    t = state.tensors
    clipped = g.op("Min", phi, g.const(t["clip"]))
    logits = g.op("Gemm", clipped, g.const(t["weight"].T), g.const(t["bias"]))
    return outputs.emit_energy(g, logits)
