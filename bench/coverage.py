"""``python -m bench coverage``: realised coverage of every set and interval.

Every set of the developer suite × α in {.05, .1, .2} × 20 re-splits by rows × methods: thresholds
from conformal rows, coverage on test rows. A cell is inside when its coverage lies in the 99 %
beta-binomial band of both sample sizes, or, where conformal scores tie at the threshold (top-k, and
the last class of a deterministic APS or RAPS), above its lower edge. ``share_inside`` is over all
cells; ``outside`` and ``allowed`` are a method's cells outside and the 99.9 % quantile of how
many are when ranks are drawn at random for the same sizes.

Probabilities are those of temperature scaling alone, standard deviations those of ``bayescap``.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any

import numpy as np

from bench.suite import load, suite
from calibration.bundle import conformal_rank, threshold_at
from calibration.conformal.cells import By, cells
from calibration.conformal.clusters import fit_clusters
from calibration.conformal.intervals import (
    INTERVALS,
    bounds,
    interval_scores,
    make,
    signed_residuals,
)
from calibration.conformal.scores import METHODS, choose, class_scores, page
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts
from calibration.fit_thresholds import run_head
from calibration.material import parts_of, split
from calibration.metrics.coverage import coverage_band
from calibration.recalibration import Base, knots
from calibration.scaling import fit_temperature
from posthoc.contract import Array, Features
from posthoc.links import softmax

ALPHAS = (0.05, 0.1, 0.2)
SEEDS, QUICK_SEEDS = 20, 3
QUICK = ("satimage", "concrete")
LEAST = 500  # rows of either sample
NULLS = 1000


def run(quick: bool) -> dict[str, Any]:
    """Coverage by set, method and level, and how many cells are outside."""
    names = [(s.name, s.task) for s in suite() if not quick or s.name in QUICK]
    seeds = QUICK_SEEDS if quick else SEEDS
    found, sizes = [], {}
    for name, task in names:
        material = load(name, grouped=False).material
        one = classes if task == "classification" else values
        for seed in range(seeds):
            parts, test = parts_of(material, split(material, seed))
            n, m = len(parts.conformal), len(test)
            sizes[name, seed] = (n, m)
            for row in one(parts, test, seed):
                low, high = coverage_band(n, m, row["alpha"])
                row |= {"set": name, "seed": seed, "low": low, "high": high}
                row["inside"] = low <= row["coverage"] and (row["tied"] or row["coverage"] <= high)
                found.append(row)
        print(name, sizes[name, 0], file=sys.stderr, flush=True)
    judged = [r for r in found if min(sizes[r["set"], r["seed"]]) >= LEAST]
    table = _table(found)
    few = sorted({r["set"] for r in found} - {r["set"] for r in judged})
    methods = _methods(judged, sizes)
    return {
        "splits": seeds,
        "cells": len(judged),
        "share_inside": float(np.mean([r["inside"] for r in judged])) if judged else None,
        "least_of_20": min((r["inside"] for r in table if r["set"] not in few), default=None),
        "too_few_rows": few,
        "methods": methods,
        "table": table,
    }


def classes(parts: Parts, test: Features, seed: int) -> list[dict[str, Any]]:
    """Sets of every score, deterministic and randomised, and of classes and clusters of them."""
    calibration, conformal = parts.calibration, parts.conformal
    assert calibration.y is not None and conformal.y is not None and test.y is not None
    t, _ = fit_temperature(calibration.z, calibration.y)
    p = {k: softmax(f.z / t) for k, f in _named(calibration, conformal, test).items()}
    y = {k: np.asarray(f.y, np.int64) for k, f in _named(calibration, conformal, test).items()}
    rng = np.random.default_rng(seed)
    u = {k: rng.uniform(size=len(v)) for k, v in y.items()}
    made = []
    for method in METHODS:
        for randomised in (False, True)[: 1 + page(method).RANDOMISES]:
            for alpha in ALPHAS:
                settings = choose(method, p["calibration"], y["calibration"], alpha)
                s = {
                    k: class_scores(method, settings, p[k], u[k] if randomised else 1.0)
                    for k in ("conformal", "test")
                }
                own = s["conformal"][np.arange(len(y["conformal"])), y["conformal"]]
                q = threshold_at(np.sort(own), alpha)
                sets = s["test"] <= q
                name = f"{method}, randomised" if randomised else method
                made.append(_row(name, alpha, sets, y["test"], bool((own == q).sum() > 1)))
    true = {k: class_scores("lac", {}, p[k])[np.arange(len(y[k])), y[k]] for k in p}
    width = p["test"].shape[1]
    kinds: tuple[By, ...] = ("class", "cluster")
    for given in kinds:
        of = np.arange(width)
        if given == "cluster":
            of = fit_clusters(true["calibration"], y["calibration"], width, min(ALPHAS))
        names = [str(i) for i in range(int(of.max()) + 1)]
        by = cells(given, true["conformal"], of[y["conformal"]], of, names)
        for alpha in ALPHAS:
            sets = class_scores("lac", {}, p["test"]) <= by.thresholds(alpha)
            # Of several thresholds the marginal coverage has no band of its own: its cells do.
            row = _row(f"lac by {given}", alpha, sets, y["test"], True)
            made.append(row | {"least": _least(sets, y["test"], alpha)})
    return made


def values(parts: Parts, test: Features, seed: int) -> list[dict[str, Any]]:
    """Intervals of every score."""
    del seed
    calibration, conformal = parts.calibration, parts.conformal
    fitted = fit_head(None, parts, FitOptions(task="regression", method="bayescap", ood="none"))
    assert fitted.head.noise is not None
    out = {k: run_head(fitted.head, f) for k, f in _named(calibration, conformal, test).items()}
    y = {k: np.asarray(f.y, np.float64) for k, f in _named(calibration, conformal, test).items()}
    base = Base()
    seen = out["calibration"]
    found = knots(base, signed_residuals(y["calibration"], seen["mean"], seen["std"]))
    made = []
    for method in INTERVALS:
        for alpha in ALPHAS:
            margin = float(base.quantile(np.asarray(1 - alpha / 2)))
            interval = make(method, "two", fitted.head.noise, margin, found)
            s = {
                k: interval_scores(interval, y[k], out[k]["mean"], out[k]["std"])
                for k in ("conformal", "test")
            }
            ends = bounds(
                interval,
                np.full((1, 1), threshold_at(np.sort(s["conformal"]), alpha)),
                out["test"]["mean"],
                out["test"]["std"],
            )
            size = float((ends[1] - ends[0]).mean())
            inside = s["test"] <= threshold_at(np.sort(s["conformal"]), alpha)
            q = threshold_at(np.sort(s["conformal"]), alpha)
            tied = bool((s["conformal"] == q).sum() > 1)
            row = {"method": method, "alpha": alpha, "coverage": float(inside.mean())}
            made.append(row | {"tied": tied, "size": size if np.isfinite(size) else None})
    return made


def _named(calibration: Features, conformal: Features, test: Features) -> dict[str, Features]:
    return {"calibration": calibration, "conformal": conformal, "test": test}


def _row(method: str, alpha: float, sets: Array, y: Array, tied: bool) -> dict[str, Any]:
    return {
        "method": method,
        "alpha": alpha,
        "coverage": float(sets[np.arange(len(y)), y].mean()),
        "tied": tied,
        "size": float(sets.sum(1).mean()),
    }


def _least(sets: Array, y: Array, alpha: float) -> float:
    """The lowest z-score of a class's coverage on the test rows, classes of 30 rows and more."""
    inside = sets[np.arange(len(y)), y]
    found = []
    for c in np.unique(y):
        here = inside[y == c]
        if len(here) >= 30:
            found.append((here.mean() - (1 - alpha)) / np.sqrt(alpha * (1 - alpha) / len(here)))
    return float(min(found, default=0.0))


def _table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over splits, a row for each set, method and level."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for r in found:
        groups[r["set"], r["method"], r["alpha"]].append(r)
    return [
        {
            "set": name,
            "method": method,
            "alpha": alpha,
            "coverage": float(np.mean([r["coverage"] for r in rows])),
            "inside": sum(r["inside"] for r in rows),
            "size": None if rows[0]["size"] is None else float(np.mean([r["size"] for r in rows])),
            "tied": any(r["tied"] for r in rows),
        }
        for (name, method, alpha), rows in groups.items()
    ]


def _methods(
    judged: list[dict[str, Any]], sizes: dict[tuple[str, int], tuple[int, int]]
) -> list[dict[str, Any]]:
    """Cells outside of each method, and how many chance allows."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for r in judged:
        groups[r["method"]].append(r)
    made = []
    for method, rows in groups.items():
        splits = sorted({(r["set"], r["seed"]) for r in rows})
        made.append(
            {
                "method": method,
                "cells": len(rows),
                "outside": sum(not r["inside"] for r in rows),
                "allowed": _allowed([sizes[s] for s in splits], all(r["tied"] for r in rows)),
            }
        )
    return made


def _allowed(sizes: list[tuple[int, int]], one_sided: bool) -> int:
    """The 99.9 % quantile of cells outside when the ranks of n + m rows are in any order.

    The k-th of n among n + m has a beta-binomial number of the m below it; the three levels of a
    split share their rows, which the draws of one uniform a split keep to the full.
    """
    rng = np.random.default_rng(0)
    total = np.zeros(NULLS, int)
    for n, m in sizes:
        ranks = sorted(conformal_rank(n, a) for a in ALPHAS)
        shape = np.diff([0, *ranks, n + 1])
        gaps = rng.gamma(shape, size=(NULLS, len(ALPHAS) + 1))
        share = np.cumsum(gaps[:, :-1], 1) / gaps.sum(1, keepdims=True)
        steps = np.diff(np.column_stack([np.zeros(NULLS), share, np.ones(NULLS)]), axis=1)
        counts = np.cumsum(np.stack([rng.multinomial(m, p) for p in steps])[:, :-1], axis=1) / m
        for i, a in enumerate(sorted(ALPHAS, reverse=True)):
            low, high = coverage_band(n, m, a)
            total += (counts[:, i] < low) | (~np.asarray(one_sided) & (counts[:, i] > high))
    return int(np.quantile(total, 0.999, method="higher"))
