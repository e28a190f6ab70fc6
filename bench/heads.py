"""``python -m bench heads``: every module on the developer suite beside temperature scaling.

For each set and five seeded splits, each module that fits the model is fitted on module rows,
calibrated on calibration rows and measured on test rows; the frozen model with a temperature (a
regression: one scale) fitted on the same calibration rows is the system to beat. No module is left
out and nothing is chosen on test rows. Splits are shared out to one process a core.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import numpy as np

from bench.material import Known
from bench.suite import load, suite
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import Fitted, run_head
from calibration.material import parts_of, split
from calibration.metrics.calibration_error import debiased_ece
from calibration.metrics.proper import brier_score, gaussian_crps
from calibration.metrics.ranking import auroc
from calibration.quality import classification_totals
from calibration.scaling import student_nll
from posthoc import registry
from posthoc.contract import Array, Features, FitError, Task
from posthoc.folds import log_loss_of_probs

SEEDS = 5
QUICK = ("magika", "satimage", "concrete")
BASELINE = "none"  # temperature scaling alone
MARGIN = 0.002  # nats: what a module may lose, since strength 0 is allowed
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def run(quick: bool) -> dict[str, Any]:
    """One row a set and module: means over splits with their standard deviations, and the paired
    difference to temperature scaling; ``worse`` lists those beyond the margin."""
    names = [s.name for s in suite() if not quick or s.name in QUICK]
    seeds = 2 if quick else SEEDS
    records = list(_measured([(name, seed) for name in names for seed in range(seeds)]))
    table = summarise(records)
    lost = [r for r in table if r["nll_difference"] > MARGIN]
    worse = [f"{r['set']}/{r['module']} {r['nll_difference']:+.4f}" for r in lost]
    return {"splits": seeds, "margin": MARGIN, "worse": worse, "table": table}


def _measured(tasks: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Every split, one process a core and one thread a process; progress on stderr."""
    for name in {n for n, _ in tasks}:
        load(name, grouped=False)  # trained and cached once, before the processes want it
    saved = {k: os.environ.get(k) for k in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            waiting = {pool.submit(measure, *t): t for t in tasks}
            for i, done in enumerate(as_completed(waiting), 1):
                name, seed = waiting[done]
                print(f"{i}/{len(tasks)} {name} split {seed}", file=sys.stderr, flush=True)
                yield from done.result()
    finally:
        for key, value in saved.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def measure(name: str, seed: int) -> list[dict[str, Any]]:
    """Every module on one split of one set."""
    known = load(name, grouped=False)
    task: Task = next(s.task for s in suite() if s.name == name)
    parts, test = parts_of(known.material, split(known.material, seed))
    found = []
    for method in (BASELINE, *methods(known, task)):
        started = time.perf_counter()
        options = FitOptions(task=task, method=method, seed=seed, **_shape(method))
        try:
            fitted = fit_head(known.material.linear, parts, options)
        except FitError as e:
            found.append({"set": name, "seed": seed, "module": method, "error": str(e)})
            continue
        figures = FIGURES[task](fitted, test, known)
        found.append(
            {
                "set": name,
                "seed": seed,
                "module": method,
                "seconds": time.perf_counter() - started,
                "strength": fitted.scaling.strength,
                **figures,
            }
        )
    _pair(found)
    return found


def methods(known: Known, task: Task) -> list[str]:
    """Modules that fit the set's model."""
    have = {"labels"}
    if known.material.frozen.phi is not None:
        have.add("features")
    if known.material.linear is not None:
        have.add("linear_head")
    return registry.applicable(registry.MODULES, task, have)


def _shape(method: str) -> dict[str, Any]:
    own = method != BASELINE and not registry.info(method).preserves
    return {
        "ood": "none",
        "max_error": None,
        "alphas": (0.3,),  # not measured here; small sets support it
        "prediction": "module" if own else "frozen",
    }


def classification(fitted: Fitted, test: Features, known: Known) -> dict[str, Any]:
    """Figures of a classifier; ``losses`` are per row, for the paired difference."""
    out = run_head(fitted.head, test)
    assert test.y is not None
    p, y = out["probs"].astype(np.float64), np.asarray(test.y, np.int64)
    losses = log_loss_of_probs(p, y)
    figures: dict[str, Any] = {
        "losses": losses,
        "nll": float(losses.mean()),
        "ece": debiased_ece(classification_totals(p, out["label"], y)),
        "brier": float(brier_score(p, y).mean()),
        "accuracy": float((out["label"] == y).mean()),
    }
    if known.outside is not None:
        strange = run_head(fitted.head, known.outside)
        figures["ood_auroc"] = auroc(strangeness(out), strangeness(strange))
    return figures


def strangeness(out: dict[str, Array]) -> Array:
    """The module's own sign of strangeness: epistemic uncertainty, else total entropy."""
    return out["epistemic"] if "epistemic" in out else out["entropy"]


def regression(fitted: Fitted, test: Features, known: Known) -> dict[str, Any]:
    """Figures of a regressor; the likelihood is Student-t where the module's predictive is."""
    out = run_head(fitted.head, test)
    assert test.y is not None
    error = np.asarray(test.y, np.float64) - out["mean"].astype(np.float64)
    std = out["std"].astype(np.float64)
    df = 1e300 if fitted.head.module is None else fitted.head.module[1].settings.get("df", 1e300)
    losses = student_nll(error, std**2, float("inf") if df > 1e9 else float(df)).mean(1)
    return {
        "losses": losses,
        "nll": float(losses.mean()),
        "crps": float(gaussian_crps(error, std).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
    }


FIGURES = {"classification": classification, "regression": regression}


def _pair(found: list[dict[str, Any]]) -> None:
    """Mean paired difference to temperature scaling of each module, in nats; losses go."""
    base = next(r for r in found if r["module"] == BASELINE)["losses"]
    for r in found:
        if "losses" in r:
            r["nll_difference"] = float((r.pop("losses") - base).mean())


def summarise(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over splits of each set and module."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for r in records:
        groups[r["set"], r["module"]].append(r)
    table = []
    for (name, module), rows in sorted(groups.items()):
        errors = sorted({r["error"] for r in rows if "error" in r})
        rows = [r for r in rows if "error" not in r]
        line: dict[str, Any] = {"set": name, "module": module, "splits": len(rows)}
        for key in rows[0] if rows else ():
            if isinstance(rows[0][key], float):
                values = np.asarray([r[key] for r in rows])
                line[key] = float(values.mean())
                line[f"{key}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        line.setdefault("nll_difference", float("nan"))
        table.append(line | ({"errors": errors} if errors else {}))
    return table
