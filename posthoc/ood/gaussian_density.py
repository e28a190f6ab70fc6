"""Density of the features under Gaussians of the classes (Mukhoti et al., CVPR 2023; DDU).

score = -log sum_c pi_c N(phi; mu_c, S), without the constant of the density: the mixture by which
the Gaussian head of `posthoc.methods.gaussian_head` classifies, with S the covariance within
classes, shrunk, and pi_c the shares of the classes. The paper's covariances are those of each
class, which need more rows of a class than features; the shared one does not (Lee et al. 2018). It
is half the distance of `posthoc.ood.mds` but for what the shares and the other classes add.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Info, LinearHead, Paper, State
from posthoc.ood.class_distance import Nearest
from posthoc.ood.gaussian import ClassSums

INFO = Info(
    name="gaussian_density",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"features", "labels"}),
    summary="density of the features under Gaussians of the classes (DDU)",
    paper=Paper(
        "Deep Deterministic Uncertainty: A New Simple Baseline",
        2023,
        "https://arxiv.org/abs/2102.11582",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment

_own = Nearest(INFO.name)
init, update, merge = _own.init, _own.update, _own.merge


def finish(stats: ClassSums, head: LinearHead | None = None) -> State:
    """The Gaussians of `posthoc.ood.class_distance`, and the logarithms of their shares.

    Raises FitError for no rows, and for features that are constant within every class.
    """
    state = _own.finish(stats, head)
    share = np.log(stats.count[stats.count > 0] / stats.n)
    # The largest of these names the likeliest class in place of the nearest.
    joint = state.tensors["half"] + share
    return State({**state.tensors, "half": joint, "log_share": share}, state.settings)


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their features N×D, in nats (float64 definition)."""
    del z
    t = state.tensors
    away, best = _own.away(state, phi)
    joint = (np.asarray(phi, np.float64) - t["centre"]) @ t["linear"] + t["half"]
    others = np.log(np.exp(joint - joint.max(1, keepdims=True)).sum(1))
    white = away @ t["factor"]
    return np.asarray((white * white).sum(1) / 2 - t["log_share"][best] - others)


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del z
    assert phi is not None
    t = state.tensors
    away, best = _own.emit_away(g, state, phi)
    psi = g.op("Sub", phi, g.const(t["centre"]))
    joint = g.op("Gemm", psi, g.const(t["linear"]), g.const(t["half"]))
    behind = g.op("Sub", joint, g.reduce("ReduceMax", joint, 1, keepdims=True))
    others = g.op("Log", g.sum(g.op("Exp", behind), 1))
    white = g.op("MatMul", away, g.const(t["factor"]))
    half = g.op("Mul", g.sum(g.op("Mul", white, white), 1), g.const(0.5))
    share = g.op("Gather", g.const(t["log_share"]), best, axis=0)
    return g.op("Sub", g.op("Sub", half, share), others)
