"""The energy of the outputs, -logsumexp(z): needs outputs only (Liu et al., NeurIPS 2020,
at temperature 1).

Outputs of one sigmoid logit, (0, l), are centred, and logarithms of probabilities, whose energy is
0, are refused: `posthoc.ood.outputs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from posthoc.contract import F64, Array, Features, FitError, Info, LinearHead, Paper, State
from posthoc.ood import outputs
from posthoc.ood.outputs import Outputs

INFO = Info(
    name="energy",
    kind="score",
    tasks=("classification",),
    needs=frozenset(),
    summary="energy of the logits",
    paper=Paper(
        "Energy-based Out-of-distribution Detection", 2020, "https://arxiv.org/abs/2010.03759"
    ),
)

if TYPE_CHECKING:
    from posthoc.graph import Fragment


def init(n_classes: int, n_features: int) -> Outputs:
    """No rows."""
    del n_classes, n_features
    return Outputs()


def update(stats: Outputs, batch: Features) -> Outputs:
    """Look what kind of outputs they are. Raises FitError where they are not finite."""
    return outputs.add(stats, batch, INFO.name)


def merge(a: Outputs, b: Outputs) -> Outputs:
    """What was seen of both."""
    return outputs.join(a, b)


def finish(stats: Outputs, head: LinearHead | None = None) -> State:
    """Whether outputs are centred; not without rows.

    Raises FitError where all rows are logarithms of probabilities.
    """
    del head
    if stats.normalised:
        raise FitError(
            "energy is 0 for every row, because this model gives probabilities and no logits; "
            "take gen, msp or max_logit"
        )
    return State({}, {"centred": stats.sigmoid})


def score(state: State, phi: Array | None, z: Array) -> F64:
    """Score of N rows from their outputs N×C (float64 definition)."""
    del phi
    return outputs.energy(outputs.centred(z) if state.settings["centred"] else z)


def emit(g: Fragment, state: State, phi: str | None, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    del phi
    return outputs.emit_energy(g, outputs.emit_centred(g, z) if state.settings["centred"] else z)
