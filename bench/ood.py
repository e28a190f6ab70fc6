"""``python -m bench ood``: scores that tell strange rows, the choice among them, and the flags.

On every set of the developer suite with strange rows and seeded splits, each score and mixture is
fitted on module rows and tells test rows from strange rows. ``auto`` is what `hedged fit` chooses
on held-out classes of module and calibration rows alone, ``auto_corrupt`` what it chooses with
corrupted copies too, before either test or strange rows are read. The mixtures that it may choose
from were put together with an eye on these six sets; the choice among them was not.

Regret is to the best of all scores and mixtures in hindsight. ``below_maximum_softmax`` lists pairs
where auto lies below it by more than half a point and two standard errors (DeLong).

Flags, over all sets: with p-values at two levels and with the Neyman–Pearson threshold, the count
of flagged test rows against the 99 % quantile of its beta-binomial law.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import betabinom

from bench.ood_agreement import agreement
from bench.processes import each
from bench.suite import find, load, suite
from calibration.fit_head import fit_head
from calibration.fit_ood import fit_ood
from calibration.fit_options import FitOptions, Parts
from calibration.fit_thresholds import run_head
from calibration.material import Material, parts_of, split
from calibration.metrics.ranking import auroc, auroc_difference
from calibration.ood_choice import MIXTURES, candidates, choose_score
from calibration.strange import corrupted_sets
from calibration.threshold import neyman_pearson_rank
from posthoc.contract import Features, FitError, Task
from posthoc.links import softmax

SEEDS, QUICK_SEEDS = 5, 2
MSP = "maximum softmax"
POINT = 0.005  # of AUROC: what auto may lie below maximum softmax
LEVELS = (0.05, 0.1)  # of p-values


def run(quick: bool) -> dict[str, Any]:
    """Mean AUROC by set and score, of the choice, its regret, and the cells of the flags."""
    names = [s.name for s in suite()]
    for name in names:
        load(name, grouped=False)  # made on first use, which two processes need not do at once
    seeds = range(QUICK_SEEDS if quick else SEEDS)
    found = sorted(each(measure, [(n, s) for n in names for s in seeds]), key=lambda r: r["seed"])
    pairs = [r for r in found if "auroc" in r]
    sets = [n for n in names if any(r["set"] == n for r in pairs)]
    table = {n: _means([r["auroc"] for r in pairs if r["set"] == n]) for n in sets}
    everywhere = [s for s in table[sets[0]] if all(s in row for row in table.values())]
    means = {s: float(np.mean([row[s] for row in table.values()])) for s in everywhere}
    fixed = max((s for s in means if not s.startswith("auto") and s != MSP), key=means.__getitem__)
    cells = [c for r in found for c in r["flags"]]
    return {
        "mean_auroc_auto": means["auto"],
        "mean_auroc_auto_corrupt": means["auto_corrupt"],
        "mean_auroc_best_fixed": means[fixed],
        "best_fixed": fixed,
        "mean_auroc_maximum_softmax": means[MSP],
        "mean_regret": {
            how: float(np.mean([r["best"] - r["auroc"][how] for r in pairs]))
            for how in ("auto", "auto_corrupt")
        },
        "below_maximum_softmax": [f"{r['set']} {r['seed']}" for r in pairs if r["below"]],
        "least_over_maximum_softmax": min(r["auroc"]["auto"] - r["auroc"][MSP] for r in pairs),
        "flag_cells": len(cells),
        "flag_cells_inside": float(np.mean([c["inside"] for c in cells])),
        "neyman_pearson_exceeds": float(
            np.mean([c["rate"] > c["level"] for c in cells if c["how"] == "neyman_pearson"])
        ),
        "agreement": agreement(),
        "chosen": {n: [r["chosen"] for r in pairs if r["set"] == n] for n in sets},
        "table": table,
        "flags": cells,
    }


def measure(name: str, seed: int) -> dict[str, Any]:
    """One split of one set."""
    known, task = load(name, grouped=False), find(name).task
    parts, test = parts_of(known.material, split(known.material, seed))
    found: dict[str, Any] = {
        "set": name,
        "seed": seed,
        "flags": flags(known.material, parts, test, task, seed),
    }
    if known.outside is None:
        return found
    linear, known_rows = known.material.linear, (parts.module, parts.calibration)
    spoilt, _ = corrupted_sets(known.material, known.data, None)
    roles = split(known.material, seed)
    mine = known.material.usable[roles == 1]
    strange = {s.name: (s.kind, s.beside(mine)) for s in spoilt}
    chosen = {
        "auto": choose_score(linear, *known_rows, task, seed=seed).score,
        "auto_corrupt": choose_score(linear, *known_rows, task, strange=strange, seed=seed).score,
    }
    inside, outside = (1 - softmax(r.z).max(1) for r in (test, known.outside))
    told: dict[str, tuple[Any, Any]] = {MSP: (inside, outside)}
    for score in candidates(task, True, linear):
        try:
            ood = fit_ood(linear, *known_rows, task=task, ood=score)
        except FitError:
            continue
        told[score] = ood.score(test.phi, test.z), ood.score(known.outside.phi, known.outside.z)
    by = {score: auroc(*both) for score, both in told.items()}
    best = max(by[s] for s in by if s != MSP)
    found["chosen"] = chosen["auto"]
    for how, mixture in chosen.items():
        assert mixture is not None and mixture in MIXTURES
        by[how] = by[mixture]
    lost = auroc_difference(told[str(chosen["auto"])], told[MSP])
    error = (lost.high - lost.low) / (2 * 1.96)
    below = lost.value < -max(POINT, 2 * error)
    return found | {"auroc": by, "best": best, "below": bool(below)}


def flags(
    material: Material, parts: Parts, test: Features, task: Task, seed: int
) -> list[dict[str, Any]]:
    """Flagged clean rows of a split by the compiled head, beside what luck allows."""
    options = FitOptions(task=task, method="none", max_error=None, alphas=(0.3,), seed=seed)
    fitted = fit_head(material.linear, parts, options)
    if fitted.ood is None:
        return []
    out, n, m = run_head(fitted.head, test), fitted.ood.n, len(test)
    found = []
    for level in LEVELS:
        k = n - math.floor(level * (n + 1) + 1e-9) + 1
        if k <= n:
            found.append(_cell("p_value", level, n, m, k, out["ood_pvalue"] <= level + 1e-7))
    rank = neyman_pearson_rank(n, fitted.ood.alpha, fitted.ood.delta)
    if rank is not None:
        found.append(_cell("neyman_pearson", fitted.ood.alpha, n, m, rank, out["ood"]))
    return found


def _cell(how: str, level: float, n: int, m: int, k: int, flagged: Any) -> dict[str, Any]:
    most = float(betabinom.ppf(0.99, m, n + 1 - k, k))
    count = int(np.sum(flagged))
    cell = {"how": how, "level": level, "n": n, "m": m, "rate": count / m, "most": most / m}
    return cell | {"inside": count <= most}


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {k: float(np.mean([r[k] for r in rows])) for k in rows[0] if all(k in r for r in rows)}
