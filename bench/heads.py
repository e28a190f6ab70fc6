"""``python -m bench heads``: every module on the developer suite beside temperature scaling.

For each set and five seeded splits, each module that fits the model is fitted on module rows,
calibrated on calibration rows and measured on test rows, by the code of `hedged compare`; the
frozen model with a temperature (a regression: one scale) fitted on the same calibration rows is the
system to beat. No module is left out and nothing is chosen on test rows. Splits are shared out to
one process a core.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from bench.processes import each
from bench.suite import find, load, suite
from calibration.comparison.candidates import ALONE, TEMPERATURE, applicable
from calibration.comparison.leaderboard import spreads
from calibration.comparison.measure import Measured, measure
from calibration.fit_options import FitOptions

SEEDS = 5
QUICK = ("magika", "satimage", "concrete")
BASELINE = ALONE  # temperature scaling alone
MARGIN = 0.002  # nats: what a module may lose, since strength 0 is allowed


def run(quick: bool) -> dict[str, Any]:
    """One row a set and module: means over splits with their standard deviations, and the paired
    difference to temperature scaling; ``worse`` lists those beyond the margin."""
    names = [s.name for s in suite() if not quick or s.name in QUICK]
    seeds = 2 if quick else SEEDS
    for name in names:
        load(name, grouped=False)  # trained and cached once, before the processes want it
    tasks = [(name, seed) for name in names for seed in range(seeds)]
    records = [r for found in each(one_split, tasks) for r in found]
    table = summarise(records)
    lost = [r for r in table if r["nll_difference"] > MARGIN]
    worse = [f"{r['set']}/{r['module']} {r['nll_difference']:+.4f}" for r in lost]
    return {"splits": seeds, "margin": MARGIN, "worse": worse, "table": table}


def one_split(name: str, seed: int) -> list[dict[str, Any]]:
    """Every module on one split of one set."""
    known, task = load(name, grouped=False), find(name).task
    # Sets are not measured here; at this level small sets support one.
    options = FitOptions(task=task, alphas=(0.3,))
    outside = {} if known.outside is None else {"outside": known.outside}
    methods, _ = applicable(known.material, task)
    runs = [
        measure(known.material, m, [TEMPERATURE], seed, options, outside=outside)[0]
        for m in methods
    ]
    base = next(r for r in runs if r.candidate.method == BASELINE)
    return [_record(name, r, base) for r in runs]


def _record(name: str, run: Measured, base: Measured) -> dict[str, Any]:
    record: dict[str, Any] = {"set": name, "seed": run.seed, "module": run.candidate.method}
    if run.error is not None:
        return record | {"error": run.error}
    apart = float((run.losses["nll"] - base.losses["nll"]).mean())
    return record | {**run.figures, "seconds": run.seconds, "nll_difference": apart}


def summarise(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over splits of each set and module."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for r in sorted(records, key=lambda r: r["seed"]):
        groups[r["set"], r["module"]].append(r)
    table = []
    for (name, module), rows in sorted(groups.items()):
        errors = sorted({r["error"] for r in rows if "error" in r})
        figures = [_floats(r) for r in rows if "error" not in r]
        line: dict[str, Any] = {"set": name, "module": module, "splits": len(figures)}
        for key, found in spreads(figures).items():
            line |= {key: found.mean, f"{key}_sd": found.sd}
        line.setdefault("nll_difference", float("nan"))
        table.append(line | ({"errors": errors} if errors else {}))
    return table


def _floats(record: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if isinstance(v, float)}
