"""Which scores are worth trying on a model, and the choice among them.

No score is best everywhere, and which one is depends on the model. ``auto`` tries mixtures of
scores that see different things (outputs, distance to classes, length, what lies outside a
subspace) on stand-ins for strange rows, `calibration.proxies`, and takes the one with the largest
mean AUROC: the mean over held-out classes, over corrupted rows and over the sets a user gives, each
kind counting once. The rows that a score is later measured on are not among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.fit_options import score_names
from calibration.proxies import HELD_OUT, Proxy, held_out_classes, table
from posthoc import registry
from posthoc import rows as blocks_of
from posthoc.contract import Features, LinearHead, Task

MIXTURES = (
    "gen+mds+mds_l2",
    "gen+mds",
    "gen+mds_l2",
    "gen+mds+nci",
    "gen+vim",
    "gen+mahalanobis",
    "gen+rmds+vim",
    "mds+mds_l2+react",
    "mds_l2+rmds",
    "rmds+vim",
)
# What is taken where there is nothing to try on: of MIXTURES the one with the largest mean AUROC
# over the pairs of `bench.ood`; outputs alone without features.
DEFAULT: dict[Task, tuple[str, ...]] = {
    "classification": ("gen+mds+mds_l2", "gen"),
    "regression": ("mahalanobis",),
}
MOST_ROWS = 5000  # of either part that a proxy is made of: a choice takes seconds, not minutes


@dataclass(frozen=True, slots=True)
class Choice:
    """The score taken, or None where none fits; mean AUROC by score and kind of proxy."""

    score: str | None
    tried: dict[str, dict[str, float]] = field(default_factory=dict)


def candidates(task: Task, features: bool, linear: LinearHead | None) -> tuple[str, ...]:
    """Every score that fits the model, and the mixtures of them."""
    singles = _singles(task, features, linear)
    return (*singles, *_of(MIXTURES, singles))


def choose_score(
    linear: LinearHead | None,
    module: Features,
    calibration: Features,
    task: Task,
    *,
    strange: Mapping[str, tuple[str, Features]] | None = None,
    seed: int = 0,
) -> Choice:
    """The score for the fitted parts; ``strange`` are further proxies by name, each with its kind.

    Of several equal ones the first of MIXTURES; DEFAULT where no class can be held out and no
    strange rows are given; outputs alone where there are no features.
    """
    singles = _singles(task, module.phi is not None, linear)
    usual = next(iter(_of(DEFAULT[task], singles)), None)
    wanted = _of(MIXTURES, singles)
    if task == "regression":
        wanted = tuple(singles)
    kinds: dict[str, str] = {}
    proxies: list[Proxy] = []
    if len(wanted) > 1:
        own, known = (blocks_of.take(rows, _some(len(rows))) for rows in (module, calibration))
        if task == "classification":
            proxies += held_out_classes(linear, own, known, seed)
            kinds |= {p.name: HELD_OUT for p in proxies}
        for name, (kind, rows) in (strange or {}).items():
            some = blocks_of.take(rows, _some(len(rows)))
            if len(some):
                proxies.append(Proxy(name, linear, own, known, known, some))
                kinds[name] = kind
    if not proxies:
        return Choice(usual)
    found, _ = table(wanted, proxies, task)
    tried = {score: _by_kind(told, kinds) for score, told in found.items()}
    if not tried:
        return Choice(usual)
    return Choice(max(tried, key=lambda score: float(np.mean(list(tried[score].values())))), tried)


def _by_kind(told: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, float]:
    """The mean of each kind of proxy."""
    names = dict.fromkeys(kinds.values())
    return {k: float(np.mean([v for n, v in told.items() if kinds[n] == k])) for k in names}


def _singles(task: Task, features: bool, linear: LinearHead | None) -> list[str]:
    have = {"labels"} | ({"features"} if features else set())
    have |= {"linear_head"} if linear is not None else set()
    return registry.applicable(registry.SCORES, task, have)


def _of(scores: Sequence[str], singles: Sequence[str]) -> tuple[str, ...]:
    """Those whose members all fit."""
    return tuple(s for s in scores if set(score_names(s)) <= set(singles))


def _some(n: int) -> slice:
    """At most MOST_ROWS of n rows, evenly taken."""
    return slice(None, None, max(1, -(-n // MOST_ROWS)))
