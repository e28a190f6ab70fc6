"""MaxLogit-pNorm: the largest logit over the norm of all (Cattelan & Silva, UAI 2024).

score = -max(c) / ||c||_p, with c the logits less their mean. p is the one whose score best ranks
the frozen model's errors on labelled rows (least area under the risk-coverage curve, AURC); p = 0
is the largest logit as it is. Where none ranks them better than the largest softmax probability,
that is taken, as in the paper. Two logits less their mean are ±c, for which every norm says the
same: of two classes only p = 0 is tried. AURC is exact up to ROWS rows and that of a sample of ROWS
beyond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State
from posthoc.ood import msp, sample
from posthoc.ood.outputs import centred, emit_centred
from posthoc.ood.sample import Sample

INFO = Info(
    name="max_logit_pnorm",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"labels"}),
    summary="the largest logit over the norm of all (MaxLogit-pNorm)",
    paper=Paper(
        "How to Fix a Broken Confidence Estimator: Evaluating Post-hoc Methods for Selective "
        "Classification with Deep Neural Networks",
        2024,
        "https://arxiv.org/abs/2305.15508",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment
POWERS = tuple(range(10))
ROWS = 10_000
# Logits that lie closer together are not told apart from equal ones, whose score is 0, the
# strangest: the norm would blow up the last digits of float32.
LEAST = 1e-3


@dataclass(frozen=True, slots=True)
class Labelled:
    """Outputs and labels of at most ROWS rows, and the number of classes."""

    classes: int
    kept: Sample


def init(n_classes: int, n_features: int) -> Labelled:
    """No rows."""
    del n_features
    return Labelled(n_classes, sample.empty(ROWS))


def update(stats: Labelled, batch: Features) -> Labelled:
    """Add the outputs and labels of a batch.

    Raises FitError without labels, for one that is no class, and for outputs that are not finite.
    """
    if batch.y is None:
        raise FitError("max_logit_pnorm needs labels: name their column with --target")
    y = np.asarray(batch.y)
    if y.ndim != 1 or y.dtype.kind not in "biu":
        raise FitError("max_logit_pnorm needs labels that are class indices")
    if len(y) and (y.min() < 0 or y.max() >= stats.classes):
        raise FitError(f"max_logit_pnorm met a label outside 0..{stats.classes - 1}")
    return Labelled(
        stats.classes, sample.add(stats.kept, Features(None, batch.z, batch.y), INFO.name)
    )


def merge(a: Labelled, b: Labelled) -> Labelled:
    """The sample of both."""
    return Labelled(a.classes, sample.join(a.kept, b.kept))


def finish(stats: Labelled, head: LinearHead | None = None) -> State:
    """The power of the least AURC, or none. Raises FitError without rows."""
    del head
    if not len(stats.kept):
        raise FitError("max_logit_pnorm was given no rows")
    z = np.asarray(stats.kept.z, np.float64)
    wrong = z.argmax(1) != stats.kept.y
    fallback = aurc(msp.score(msp.finish(stats.classes), None, z), wrong)
    powers = POWERS if stats.classes > 2 else POWERS[:1]
    found = {p: aurc(normed(z, p), wrong) for p in powers}
    best = min(found, key=found.__getitem__)
    gains = found[best] < fallback
    return State(
        {},
        {
            "p": best if gains else None,
            "aurc": found[best] if gains else fallback,
            "aurc_msp": fallback,
            "classes": stats.classes,
            "rows": stats.kept.seen,
            "read": len(stats.kept),
        },
    )


def aurc(scores: Array, wrong: Array) -> float:
    """Mean over k of the share of wrong ones (N, bool) among the k rows of the least ``scores``
    N, in expectation over the order of equal ones."""
    _, block, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    errors = np.concatenate([[0], np.cumsum(np.bincount(block, weights=wrong))])
    k = np.arange(1, len(scores) + 1)
    return float((np.interp(k, ends, errors) / k).mean())


def normed(z: Array, p: int) -> F64:
    """The score of outputs N×C with power p."""
    if p == 0:
        return np.asarray(-np.asarray(z, np.float64).max(1))
    c = centred(z)
    # Over the largest first, so that no power leaves float32. The norm of the rest is 1 or more.
    c = c / np.maximum(np.abs(c).max(1, keepdims=True), LEAST)
    norm = (np.abs(c) ** p).sum(1) ** (1 / p)
    return np.asarray(-c.max(1) / np.maximum(norm, 1.0))


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their outputs N×C (float64 definition)."""
    p = state.settings["p"]
    return msp.score(state, phi, z) if p is None else normed(z, p)


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    p = state.settings["p"]
    if p is None:
        return msp.emit(g, state, phi, z)
    if p == 0:
        return g.op("Neg", g.reduce("ReduceMax", z, 1))
    c = emit_centred(g, z)
    size = g.reduce("ReduceMax", g.op("Abs", c), 1, keepdims=True)
    c = g.op("Div", c, g.op("Max", size, g.const(LEAST)))
    total = g.sum(g.op("Pow", g.op("Abs", c), g.const(float(p))), 1)
    norm = g.op("Max", g.op("Pow", total, g.const(1 / p)), g.const(1.0))
    return g.op("Neg", g.op("Div", g.reduce("ReduceMax", c, 1), norm))
