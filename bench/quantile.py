"""``python -m bench quantile``: are quantiles what they say, after recalibration.

On every regression set of the developer suite and 20 re-splits by rows: the head of ``bayescap``,
recalibrated on conformal rows, measured on test rows. ``pce`` is the mean over 100 levels of the
distance between a level and the share of truths at or below its quantile (`PitTotals.pce`, by
quantiles as served); ``over_floor`` is that over what chance leaves on n conformal and m test rows,
``0.3133 sqrt(1/n + 1/m)``. ``max_pce_over_floor`` is the largest mean over splits of any set and
kind, at most 1.25; no single split may be above 3.5. Kind ``none`` is the frozen model's mean with
the head's standard deviations, as a Gaussian.

Beside it ``crps`` (twice the mean pinball loss over the levels) and ``width`` (mean of the central
90 %) in the target's units, and in nats ``nll`` where there is a density: before, and for ``kde``
``r(F(y)) f(y)``, R being the recalibration and r its density.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any, Literal, get_args

import numpy as np

from bench.suite import load, suite
from calibration.conformal.intervals import signed_residuals
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import run_head
from calibration.material import Material, parts_of, split
from calibration.metrics.regression import PCE_LEVELS, pce_floor
from calibration.recalibration import Base, Kind, Recalibration, base_of, factors, recalibrate
from posthoc.contract import F64, Array

SEEDS, QUICK_SEEDS = 20, 3
QUICK = ("concrete", "nox")
LIMIT, LIMIT_ONE = 1.25, 3.5
KINDS: tuple[Kind, ...] = get_args(Kind)
ALL_KINDS: tuple[Kind | Literal["none"], ...] = ("none", *KINDS)
CENTRAL = 4, 95  # levels 5/101 and 96/101
KNOTS = 2001  # of a log density, over [0, 1]


def run(quick: bool) -> dict[str, Any]:
    """One row a set and kind: means over splits, and the largest single one."""
    names = QUICK if quick else [s.name for s in suite() if s.task == "regression"]
    found = []
    for name in names:
        material = load(name, grouped=False).material
        for seed in range(QUICK_SEEDS if quick else SEEDS):
            found += [{"set": name, **row} for row in one(material, seed)]
        print(name, file=sys.stderr, flush=True)
    table = _table(found)
    after = [r for r in table if r["kind"] != "none"]
    return {
        "splits": QUICK_SEEDS if quick else SEEDS,
        "limit": LIMIT,
        "limit_single": LIMIT_ONE,
        "max_pce_over_floor": max(r["over_floor"] for r in after),
        "max_single_over_floor": max(r["over_floor_max"] for r in after),
        "above": [
            f"{r['set']}, {r['kind']}"
            for r in after
            if r["over_floor"] > LIMIT or r["over_floor_max"] > LIMIT_ONE
        ],
        "table": table,
    }


def one(material: Material, seed: int) -> list[dict[str, Any]]:
    """The figures of every kind on one split."""
    parts, test = parts_of(material, split(material, seed))
    options = FitOptions(task="regression", method="bayescap", ood="none")
    head = fit_head(None, parts, options).head
    base, errors = base_of(head), []
    for part in (parts.conformal, test):
        out, y = run_head(head, part), np.asarray(part.y, np.float64)
        errors.append(signed_residuals(y, out["mean"], out["std"]))
    std = np.asarray(out["std"], np.float64)  # of the test rows
    conformal, new = errors
    floor = pce_floor(len(test), len(parts.conformal))
    return [
        {"kind": kind, "floor": floor, **figures(kind, base, conformal, new, std)}
        for kind in ALL_KINDS
    ]


def figures(
    kind: Kind | Literal["none"], base: Base, conformal: Array, test: Array, std: Array
) -> dict[str, float]:
    """PCE, CRPS, width and, where there is a density, NLL of test rows, from the standardised
    errors of conformal rows n×K and test rows m×K, whose standard deviations are ``std`` m×K."""
    r = np.asarray(test, np.float64)
    maps: tuple[Recalibration, ...] = ()
    if kind == "none":
        quantiles = np.tile(base.quantile(PCE_LEVELS), (r.shape[1], 1))
    else:
        maps = recalibrate(kind, base, conformal)
        quantiles = factors(base, maps, conformal, PCE_LEVELS)
    beyond = r[:, :, None] - quantiles  # m×K×100
    observed = (beyond <= 0).mean(axis=0)
    pinball = np.where(beyond > 0, PCE_LEVELS, PCE_LEVELS - 1) * beyond
    low, high = CENTRAL
    row = {
        "pce": float(np.abs(observed - PCE_LEVELS).mean()),
        "crps": float((2 * pinball.mean(axis=-1) * std).mean()),
        "width": float(((quantiles[:, high] - quantiles[:, low]) * std).mean()),
    }
    if kind in ("none", "kde"):
        log_density = base.log_density(r) - np.log(std)
        for k, found in enumerate(maps):
            log_density[:, k] += interpolated(found, base.cdf(r[:, k]))
        row["nll"] = float(-log_density.mean())
    return row


def interpolated(found: Recalibration, u: Array) -> F64:
    """`Recalibration.log_density` between knots a twentieth of its kernel apart."""
    knots = np.linspace(0, 1, KNOTS)
    return np.asarray(np.interp(u, knots, found.log_density(knots)))


def _table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for r in found:
        groups[r["set"], r["kind"]].append(r)
    made = []
    for (name, kind), rows in groups.items():
        ratios = [r["pce"] / r["floor"] for r in rows]
        row = {"set": name, "kind": kind, "over_floor": float(np.mean(ratios))}
        row |= {"over_floor_max": max(ratios)}
        columns = [c for c in ("pce", "floor", "crps", "width", "nll") if c in rows[0]]
        made.append(row | {c: float(np.mean([r[c] for r in rows])) for c in columns})
    return made
