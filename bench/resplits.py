"""``python -m bench resplits``: what the demo claims, over seeded re-splits of cached features.

For magika: labels kept, paired NLL and debiased ECE against temperature scaling alone, prior
precision, coverage with its band, and AUROC for unknown types of the score, of the epistemic
share and of the frozen model's maximum softmax.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.material import Known, magika
from calibration.fit import fit_material
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import Fitted, run_head
from calibration.metrics.calibration_error import ece_difference
from calibration.metrics.coverage import coverage_band
from calibration.metrics.ranking import auroc
from posthoc.contract import Features
from posthoc.folds import log_softmax
from posthoc.links import softmax

SEEDS = 20


def run(quick: bool) -> dict[str, Any]:
    """Figures of each seed and their means."""
    known = magika()
    rows = [figures(known, seed) for seed in range(5 if quick else SEEDS)]
    keys = [k for k, v in rows[0].items() if isinstance(v, float)]
    alphas = rows[0]["coverage"]
    return {
        "seeds": len(rows),
        **{f"mean_{k}": float(np.mean([r[k] for r in rows[:5]])) for k in keys},
        "inside_band": {
            a: sum(r["band"][a][0] <= r["coverage"][a] <= r["band"][a][1] for r in rows)
            for a in alphas
        },
        "rows": rows,
    }


def figures(known: Known, seed: int) -> dict[str, Any]:
    """Every figure for one split."""
    assert known.outside is not None
    options = FitOptions(task="classification", seed=seed)
    fitted, test, _ = fit_material(known.material, options)
    out, strange = run_head(fitted.head, test), run_head(fitted.head, known.outside)
    assert test.y is not None
    y = np.asarray(test.y, np.int64)
    row = np.arange(len(y))
    label = test.z.argmax(1)
    scaled = log_softmax(test.z / fitted.scaling.temperature_alone)
    hedged_nll = -np.log(np.maximum(out["probs"][row, y].astype(np.float64), 1e-38))
    right = label == y
    ece = ece_difference((out["confidence"], right), (np.exp(scaled).max(1), right), seed=seed)
    return {
        "seed": seed,
        "test_rows": len(y),
        "accuracy": float(right.mean()),
        "labels_equal": float((out["label"] == label).mean()),
        "nll_frozen": float(-log_softmax(test.z)[row, y].mean()),
        "nll_scaled": float(-scaled[row, y].mean()),
        "nll_difference": float((hedged_nll + scaled[row, y]).mean()),
        "ece_difference": ece.value,
        "ece_difference_low": ece.low,
        "ece_difference_high": ece.high,
        "prior_precision": float(fitted.module.settings["prior_precision"]),
        "strength": fitted.scaling.strength,
        "epistemic_auroc": auroc(out["epistemic"], strange["epistemic"]),
        "ood_auroc": auroc(out["ood_score"], strange["ood_score"]),
        "msp_auroc": auroc(1 - softmax(test.z).max(1), 1 - softmax(known.outside.z).max(1)),
        **_coverage(fitted, test, out),
    }


def _coverage(fitted: Fitted, test: Features, out: dict[str, Any]) -> dict[str, Any]:
    """Raw sets at every level: coverage, the 99 % beta-binomial band, size, share of empty sets."""
    true = out["set_scores"][np.arange(len(test)), np.asarray(test.y, np.int64)]
    found: dict[str, Any] = {"coverage": {}, "band": {}, "set_size": {}, "empty": {}}
    for g in fitted.conformal.guarantees:
        assert g.threshold is not None
        sets = out["set_scores"] <= g.threshold
        key = f"{g.alpha:g}"
        found["coverage"][key] = float((true <= g.threshold).mean())
        found["band"][key] = coverage_band(g.n, len(test), g.alpha)
        found["set_size"][key] = float(sets.sum(1).mean())
        found["empty"][key] = float((sets.sum(1) == 0).mean())
    return found
