"""Which OOD score: chosen per model on held-out classes, before any test row is read.

Each fold hides some classes: their calibration rows play the strangers, the score is fitted on
module rows of the other classes, and the hidden classes' outputs are dropped. That proxy is
optimistic (a hidden class still shaped the features), so it chooses and never claims.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from posthoc import registry
from posthoc.contract import Array, Features

FOLDS = 5


def auroc(inside: Array, outside: Array) -> float:
    """P(a stranger scores above an insider), ties half: the area under the ROC curve."""
    ranks = rankdata(np.concatenate([inside, outside]))
    n, m = len(inside), len(outside)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def choose_score(
    names: Sequence[str], module: Features, calibration: Features, seed: int
) -> tuple[str, dict[str, float]]:
    """The name with the best mean AUROC over the folds, and every mean. The first name wins ties
    and is the answer when there are too few classes with rows to hide some."""
    if len(names) == 1 or module.y is None or calibration.y is None:
        return names[0], {}
    classes = np.intersect1d(module.y, calibration.y)
    if len(classes) < 2 * FOLDS:
        return names[0], {}
    folds = np.arange(len(classes)) % FOLDS
    order = np.random.default_rng(seed).permutation(classes)
    totals = dict.fromkeys(names, 0.0)
    for fold in range(FOLDS):
        hidden = order[folds == fold]
        shown = np.setdiff1d(np.arange(module.z.shape[1]), hidden)
        fit = _without(module, hidden, shown)
        inside = _without(calibration, hidden, shown)
        strange = np.isin(calibration.y, hidden)
        for name in names:
            page = registry.page(name)
            state = page.finish(
                page.update(page.init(len(shown), 0 if fit.phi is None else fit.phi.shape[1]), fit)
            )
            phi_out = None if calibration.phi is None else calibration.phi[strange]
            totals[name] += auroc(
                page.score(state, inside.phi, inside.z),
                page.score(state, phi_out, calibration.z[strange][:, shown]),
            )
    means = {n: t / FOLDS for n, t in totals.items()}
    return max(names, key=lambda n: means[n]), means


def _without(rows: Features, hidden: Array, shown: Array) -> Features:
    """Rows of the shown classes, with the hidden classes' outputs dropped."""
    assert rows.y is not None
    keep = ~np.isin(rows.y, hidden)
    return Features(
        None if rows.phi is None else rows.phi[keep],
        rows.z[keep][:, shown],
        np.searchsorted(shown, rows.y[keep]),
    )
