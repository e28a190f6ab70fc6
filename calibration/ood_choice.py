"""Which scores are worth trying on a model, and the choice among them."""

from __future__ import annotations

from posthoc import registry
from posthoc.contract import LinearHead, Task

# Means of scores that see different things: outputs, distance, what is left outside a subspace.
MIXTURES = (
    "gen+mahalanobis",
    "gen+rmds",
    "gen+vim",
    "gen+knn",
    "rmds+vim",
    "gen+rmds+vim",
    "rank:gen+rmds+vim",
)


def candidates(task: Task, features: bool, linear: LinearHead | None) -> tuple[str, ...]:
    """Every score that fits the model, and the mixtures of them."""
    have = {"labels"} | ({"features"} if features else set())
    have |= {"linear_head"} if linear is not None else set()
    singles = registry.applicable(registry.SCORES, task, have)
    mixed = [m for m in MIXTURES if set(m.removeprefix("rank:").split("+")) <= set(singles)]
    return (*singles, *mixed)
