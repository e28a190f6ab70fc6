"""``python -m bench ood``: AUROC of every score on the sets that have strange rows.

Each score is fitted on module rows and told apart on test rows against strange rows, over seeded
splits, beside the default of ``hedged fit`` and maximum softmax.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.ood_agreement import agreement
from bench.suite import load, suite
from calibration.fit_ood import DEFAULT_SCORES, fit_ood
from calibration.material import parts_of, split
from calibration.metrics.ranking import auroc
from posthoc import registry
from posthoc.links import softmax

SEEDS = 5
MSP = "maximum softmax"


def run(quick: bool) -> dict[str, Any]:
    """Mean AUROC by set and score; the default's mean, and that of the best single score."""
    default = "+".join(DEFAULT_SCORES["classification"])
    singles = [n for n in registry.SCORES if "classification" in registry.info(n).tasks]
    table: dict[str, dict[str, float]] = {}
    for name in (s.name for s in suite() if s.task == "classification"):
        known = load(name, grouped=False)
        if known.outside is None:
            continue
        found: dict[str, list[float]] = {}
        for seed in range(2 if quick else SEEDS):
            parts, test = parts_of(known.material, split(known.material, seed))
            for score in (*singles, default):
                ood = fit_ood(
                    known.material.linear,
                    parts.module,
                    parts.calibration,
                    task="classification",
                    ood=score,
                )
                assert ood is not None
                inside, outside = (ood.score(r.phi, r.z) for r in (test, known.outside))
                found.setdefault(score, []).append(auroc(inside, outside))
            inside, outside = (1 - softmax(r.z).max(1) for r in (test, known.outside))
            found.setdefault(MSP, []).append(auroc(inside, outside))
        table[name] = {score: float(np.mean(values)) for score, values in found.items()}
    means = {s: float(np.mean([row[s] for row in table.values()])) for s in (*singles, default)}
    best = max(singles, key=means.__getitem__)
    return {
        "mean_auroc_auto": means[default],
        "mean_auroc_best_fixed": means[best],
        "best_fixed": best,
        "default": default,
        "least_over_maximum_softmax": min(row[default] - row[MSP] for row in table.values()),
        "agreement": agreement(),
        "table": table,
    }
