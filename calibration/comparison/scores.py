"""Every score on one split: how well it tells strange rows, real ones and stand-ins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.comparison.leaderboard import spreads
from calibration.comparison.records import ScoreStanding, Spread
from calibration.material import DEFAULT_SPLIT, ROLES, Material, parts_of, split
from calibration.proxies import HELD_OUT, Proxy, held_out_classes, table
from calibration.strange import Strange
from posthoc.contract import Task


@dataclass(frozen=True, slots=True)
class Told:
    """AUROC of scores by strange set on one split, and why other scores have none."""

    seed: int
    auroc: dict[str, dict[str, float]]
    failed: dict[str, str] = field(default_factory=dict)


def tell(
    material: Material,
    scores: Sequence[str],
    seed: int,
    task: Task,
    strange: Sequence[Strange],
    fractions: Mapping[str, float] = DEFAULT_SPLIT,
) -> Told:
    """Each score, fitted on module rows and standardised on calibration rows, on test rows beside
    each strange set; of a classifier also on held-out classes, as the mean over their groups."""
    roles = split(material, seed, fractions)
    parts, test = parts_of(material, roles)
    tested = np.asarray(material.usable[roles == ROLES.index("test")], np.int64)
    proxies = []
    if task == "classification":
        proxies += list(held_out_classes(material.linear, parts.module, parts.calibration, seed))
    for s in strange:
        rows = s.beside(tested)
        if len(rows):
            proxies.append(
                Proxy(s.name, material.linear, parts.module, parts.calibration, test, rows)
            )
    found, failed = table(scores, proxies, task)
    return Told(seed, {score: _pooled(told) for score, told in found.items()}, failed)


def _pooled(told: Mapping[str, float]) -> dict[str, float]:
    """Groups of held-out classes as one set, their mean."""
    pooled: dict[str, list[float]] = defaultdict(list)
    for name, value in told.items():
        pooled[HELD_OUT if name.startswith(HELD_OUT) else name].append(value)
    return {name: float(np.mean(values)) for name, values in pooled.items()}


def ranked(told: Iterable[Told], kinds: Mapping[str, str]) -> tuple[ScoreStanding, ...]:
    """Scores by their mean AUROC over ``kinds`` of strange sets (set → kind), each the mean of its
    sets, the largest first; those that failed last."""
    runs = sorted(told, key=lambda t: t.seed)
    by_score: dict[str, list[dict[str, float]]] = defaultdict(list)
    errors: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for score, found in run.auroc.items():
            by_score[score].append(found)
        for score, why in run.failed.items():
            errors[score].add(why)
    means: dict[str, Spread] = {}
    for score, each in by_score.items():
        if score not in errors and all(each):
            over = [{"mean": _mean_of_kinds(found, kinds)} for found in each]
            means[score] = spreads(over)["mean"]
    order = sorted(means, key=lambda s: -means[s].mean)
    good = [
        ScoreStanding(rank=i, score=s, mean=means[s], auroc=spreads(by_score[s]))
        for i, s in enumerate(order, 1)
    ]
    bad = [
        ScoreStanding(rank=None, score=s, errors=tuple(sorted(errors[s]))) for s in sorted(errors)
    ]
    return tuple(good + bad)


def _mean_of_kinds(found: Mapping[str, float], kinds: Mapping[str, str]) -> float:
    means: dict[str, list[float]] = defaultdict(list)
    for name, value in found.items():
        means[kinds.get(name, name)].append(value)
    return float(np.mean([np.mean(values) for values in means.values()]))
