"""The largest logit, negated: needs outputs only (Hendrycks et al., ICML 2022).

Logits are taken as they are. Those of one sigmoid logit, (0, l), are centred (`posthoc.ood.outputs`
says why).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, Info, LinearHead, Paper, State
from posthoc.ood.outputs import Outputs, add, centred, emit_centred, join

INFO = Info(
    name="max_logit",
    kind="score",
    tasks=("classification",),
    needs=frozenset(),
    summary="the largest logit",
    paper=Paper(
        "Scaling Out-of-Distribution Detection for Real-World Settings",
        2022,
        "https://arxiv.org/abs/1911.11132",
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment


def init(n_classes: int, n_features: int) -> Outputs:
    """No rows."""
    del n_classes, n_features
    return Outputs()


def update(stats: Outputs, batch: Features) -> Outputs:
    """Look whether the outputs are one sigmoid logit. Raises FitError where they are not finite."""
    return add(stats, batch, INFO.name)


def merge(a: Outputs, b: Outputs) -> Outputs:
    """What was seen of both."""
    return join(a, b)


def finish(stats: Outputs, head: LinearHead | None = None) -> State:
    """Whether outputs are centred; not without rows."""
    del head
    return State({}, {"centred": stats.sigmoid})


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their outputs N×C (float64 definition)."""
    del phi
    z = centred(z) if state.settings["centred"] else np.asarray(z, np.float64)
    return np.asarray(-z.max(1))


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del phi
    z = emit_centred(g, z) if state.settings["centred"] else z
    return g.op("Neg", g.reduce("ReduceMax", z, 1))
