"""``python -m bench scaling``: richer families of probabilities beside the temperature.

On every classification set of the developer suite and 20 seeded re-splits, each family is fitted
on calibration rows after the temperature, and so is the automatic choice; ``excess`` is the mean
negative log-likelihood on test rows less the temperature's, in nats. ``max_nll_excess`` is the
largest mean of the automatic choice over sets, at most 0.001; ``ece`` is the debiased calibration
error of the top class.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from bench.suite import load, suite
from calibration.families import apply_family, fit_family
from calibration.families.choice import candidates, chosen, gains
from calibration.material import parts_of, split
from calibration.metrics.calibration_error import debiased_ece
from calibration.quality import classification_totals
from calibration.scaling import fit_temperature
from posthoc.contract import Array
from posthoc.folds import log_softmax

SEEDS, QUICK_SEEDS = 20, 3
QUICK = ("magika", "satimage")
LIMIT = 0.001  # nats


def run(quick: bool) -> dict[str, Any]:
    """One row a set and family: means and standard deviations over splits."""
    names = [s.name for s in suite() if s.task == "classification"]
    table = []
    for name in names if not quick else QUICK:
        found = [one(name, seed) for seed in range(QUICK_SEEDS if quick else SEEDS)]
        table += [_row(name, family, found) for family in found[0]["excess"]]
        print(name, file=sys.stderr, flush=True)
    worst = [r for r in table if r["family"] == "auto"]
    return {
        "splits": QUICK_SEEDS if quick else SEEDS,
        "limit": LIMIT,
        "max_nll_excess": max(r["excess"] for r in worst),
        "table": table,
    }


def one(name: str, seed: int) -> dict[str, Any]:
    """Excess and calibration error of every family, and which was chosen, on one split."""
    material = load(name, grouped=False).material
    parts, test = parts_of(material, split(material, seed))
    assert parts.calibration.y is not None and test.y is not None
    y, truth = (np.asarray(f.y, np.int64) for f in (parts.calibration, test))
    t, _ = fit_temperature(parts.calibration.z, y)
    log_p, fresh = (log_softmax(f.z / t) for f in (parts.calibration, test))
    label = test.z.argmax(1)
    tried = candidates(len(y), log_p.shape[1])
    taken = chosen(gains(log_p, y, tried, seed)) or "temperature"
    made = {"temperature": fresh}
    made |= {n: apply_family(fit_family(n, log_p, y), fresh) for n in tried}
    made["auto"] = made[taken]
    at = np.arange(len(truth)), truth
    return {
        "chosen": taken,
        "excess": {n: float((fresh[at] - v[at]).mean()) for n, v in made.items()},
        "ece": {n: _ece(np.exp(v), label, truth) for n, v in made.items()},
    }


def _ece(p: Array, label: Array, y: Array) -> float:
    return debiased_ece(classification_totals(p, label, y))


def _row(name: str, family: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    excess = [f["excess"][family] for f in found]
    row: dict[str, Any] = {
        "set": name,
        "family": family,
        "excess": float(np.mean(excess)),
        "excess_sd": float(np.std(excess, ddof=1)),
        "ece": float(np.mean([f["ece"][family] for f in found])),
    }
    if family == "auto":
        taken = [f["chosen"] for f in found]
        row["chosen"] = {n: taken.count(n) for n in sorted(set(taken))}
    return row
