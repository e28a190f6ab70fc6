"""Rows that stand for strange ones when a score is chosen: never those it is measured on.

Held-out classes: some classes are taken for unknown. A score is fitted on module rows of the
others, whose logits and head rows are all it sees, and tells calibration rows of the others from
rows of those. The network was trained on the held-out classes too, and its features know them:
what a score reaches here is optimistic, but it is the ranking of scores that is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.fit_ood import fit_ood
from calibration.fit_options import RANK, score_names
from calibration.metrics.ranking import auroc
from posthoc import rows as blocks_of
from posthoc.contract import F64, Array, Features, FitError, LinearHead, Task

HELD_OUT = "held-out classes"
ABOUT = "classes that the score did not see; the network did, so this is optimistic"
GROUPS = 5  # of classes, held out in turn: each score is fitted so often for a choice
FEWEST_CLASSES = 3  # two are left then, fewer have no outputs to score
FEWEST_ROWS = 20  # on either side: below, an AUROC is off by a tenth by luck alone


@dataclass(frozen=True, slots=True)
class Proxy:
    """What scores are fitted on (``module``), standardised on (``calibration``) and tell apart."""

    name: str
    linear: LinearHead | None
    module: Features
    calibration: Features
    inside: Features
    outside: Features

    def told(self, score: str, task: Task) -> tuple[F64, F64]:
        """What one score, or rank:score, says of the rows inside and outside; FitError where it
        does not fit."""
        ood = fit_ood(self.linear, self.module, self.calibration, task=task, ood=score)
        inside, outside = (ood.score(rows.phi, rows.z) for rows in (self.inside, self.outside))
        return inside, outside


def held_out_classes(
    linear: LinearHead | None, module: Features, calibration: Features, seed: int = 0
) -> Iterator[Proxy]:
    """GROUPS groups of classes in turn (each class where there are fewer), by labels. Nothing of
    fewer than FEWEST_CLASSES classes with rows."""
    assert module.y is not None and calibration.y is not None
    rows = blocks_of.join([module, calibration])
    y = np.asarray(rows.y, np.int64)
    classes = np.unique(y[: len(module)])
    if len(classes) < FEWEST_CLASSES:
        return
    order = np.random.default_rng(seed).permutation(classes)
    width = module.z.shape[1]
    for i, held in enumerate(np.array_split(order, min(GROUPS, len(classes)))):
        kept = np.setdiff1d(np.arange(width), held)
        out = np.isin(y, held)
        known = ~out[: len(module)], ~out[len(module) :]
        inside = without(blocks_of.take(calibration, known[1]), kept)
        proxy = Proxy(
            f"{HELD_OUT} {i + 1}",
            None if linear is None else LinearHead(linear.weight[kept], linear.bias[kept]),
            without(blocks_of.take(module, known[0]), kept),
            inside,
            inside,
            without(blocks_of.take(rows, out), kept, labelled=False),
        )
        if min(map(len, (proxy.module, proxy.inside, proxy.outside))) >= FEWEST_ROWS:
            yield proxy


def without(rows: Features, kept: Array, *, labelled: bool = True) -> Features:
    """Rows as a model of the classes ``kept`` (ascending) alone would have them."""
    y = np.searchsorted(kept, np.asarray(rows.y, np.int64)) if labelled else None
    return Features(rows.phi, rows.z[:, kept], y)


def table(
    scores: Sequence[str], proxies: Sequence[Proxy], task: Task
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """(AUROC by score and proxy, why other scores have none). Scores are expressions as
    `hedged fit --ood` takes them; a member that several name is fitted once a proxy."""
    found: dict[str, dict[str, float]] = {score: {} for score in scores}
    failed: dict[str, str] = {}
    for proxy in proxies:
        said: dict[str, tuple[F64, F64]] = {}
        for score in scores:
            if score in failed:
                continue
            ranked = RANK if score.startswith(RANK) else ""
            members = [ranked + name for name in score_names(score)]
            try:
                for name in members:
                    if name not in said:
                        said[name] = proxy.told(name, task)
            except FitError as e:
                failed[score] = str(e)
                del found[score]
                continue
            sides = (np.mean([said[m][i] for m in members], axis=0) for i in range(2))
            found[score][proxy.name] = auroc(*sides)
    return found, failed
