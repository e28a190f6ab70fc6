"""SCALE: the energy after activations are scaled by how concentrated they are (Xu et al., ICLR
2024, with their percentile 85).

score = -logsumexp(W (phi exp(s1 / s2)) + b), with s1 the sum of a row's activations and s2 that of
the largest 15 %. The paper's features come from a ReLU. Here those below 0 count as 0 in both sums,
which changes nothing behind a ReLU and keeps 1 <= s1 / s2 <= D / k, so that exp does not overflow;
all features are scaled, whatever their sign. A row without an activation above 0 has s1 / s2 = 1,
the least there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State
from posthoc.ood import outputs

INFO = Info(
    name="scale",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"features", "linear_head"}),
    summary="energy after activations are scaled by their concentration (SCALE)",
    paper=Paper(
        "Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement",
        2024,
        "https://arxiv.org/abs/2310.00227",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment
PERCENTILE = 85.0
LEAST = 1e-30  # a smaller s2 counts as this, in float32 too


@dataclass(frozen=True, slots=True)
class Ranges:
    """``low`` and ``high`` D: the least and the largest of each feature on ``rows`` rows."""

    rows: int
    low: F64
    high: F64


def init(n_classes: int, n_features: int) -> Ranges:
    """No rows."""
    del n_classes
    return Ranges(0, np.full(n_features, np.inf), np.full(n_features, -np.inf))


def update(stats: Ranges, batch: Features) -> Ranges:
    """Nothing is learnt of features but that they are fit for use.

    Raises FitError without any, and where they are not finite.
    """
    if batch.phi is None:
        raise FitError("scale needs features; the model is a black box")
    if not np.isfinite(batch.phi).all():
        raise FitError("scale met features that are not finite")
    if not len(batch):
        return stats
    phi = np.asarray(batch.phi, np.float64)
    return merge(stats, Ranges(len(phi), phi.min(0), phi.max(0)))


def merge(a: Ranges, b: Ranges) -> Ranges:
    """The ranges over both sets of rows."""
    return Ranges(a.rows + b.rows, np.minimum(a.low, b.low), np.maximum(a.high, b.high))


def finish(stats: Ranges, head: LinearHead | None = None) -> State:
    """The head, and of how many activations s2 is the sum.

    Raises FitError without a linear head, for fewer than two rows, or for constant features.
    """
    linear = outputs.head_of(head, INFO.name)
    if stats.rows < 2:
        raise FitError(f"scale needs at least two rows and has {stats.rows}")
    if (stats.low == stats.high).all():
        raise FitError("scale: every feature is constant on the given rows")
    d = len(stats.low)
    top = max(1, d - round(d * PERCENTILE / 100))
    return State(
        {"weight": linear.weight, "bias": linear.bias},
        {"percentile": PERCENTILE, "top": top, "rows": stats.rows},
    )


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D (float64 definition)."""
    del z
    t, phi = state.tensors, np.asarray(phi, np.float64)
    active = np.sort(np.maximum(phi, 0.0), axis=1)
    top = active[:, -state.settings["top"] :].sum(1)
    ratio = np.maximum(active.sum(1) / np.maximum(top, LEAST), 1.0)
    return outputs.energy(np.exp(ratio)[:, None] * (phi @ t["weight"].T) + t["bias"])


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del z
    assert phi is not None
    t = state.tensors
    active = g.op("Relu", phi)
    largest, _ = g.op2("TopK", active, g.const([state.settings["top"]], "int64"), axis=1, sorted=0)
    top = g.op("Max", g.sum(largest, 1, keepdims=True), g.const(LEAST))
    ratio = g.op("Div", g.sum(active, 1, keepdims=True), top)
    factor = g.op("Exp", g.op("Max", ratio, g.const(1.0)))
    product = g.op("Mul", g.op("MatMul", phi, g.const(t["weight"].T)), factor)
    return outputs.emit_energy(g, g.op("Add", product, g.const(t["bias"])))
