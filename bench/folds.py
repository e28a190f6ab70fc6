"""``python -m bench folds``: metrics over 10 million rows, and thresholds from as many scores.

Every additive metric is folded in a process of its own over 65,536 rows at a time, ``cycle``
batches drawn beforehand being given in turn, so that what is timed and what memory grows by is the
fold and no generator. Memory is the peak above what the process held after a first round, for a
tenth of the rows and for all of them: a constant one is the same. ``exact_ranking`` keeps every
score, and is the one that grows. ``seconds_10m_rows`` adds up all additive metrics.

The conformal quantile of 10 million scores is found by sorting (as ``hedged fit`` does), by
partition and in two passes over pieces; p-values are those of the table in the graph, and exact.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from calibration.bundle import conformal_rank, threshold_at
from calibration.metrics import conditional_coverage, correlation, interval, ks, regression, smooth
from calibration.metrics.brier import brier_parts
from calibration.metrics.class_calibration import class_bins
from calibration.metrics.coverage import set_sizes
from calibration.metrics.equal_mass import confidence_bins
from calibration.metrics.ranking_folds import exact_ranking, ranking_histogram
from calibration.metrics.top_label import top_label_bins
from calibration.metrics.totals import classification_totals, regression_totals
from calibration.metrics.uce import equal_mass_edges, variance_bins
from calibration.quantile import order_statistics
from calibration.threshold import pvalue_table, pvalues
from posthoc.contract import Array
from posthoc.folds import Fold

ROWS, QUICK_ROWS = 10_000_000, 1_000_000
ASKED = 1_000_000  # rows that want a p-value
BATCH, CYCLE, CLASSES = 65_536, 4, 10
ALPHA = 0.1
CONSTANT_MB = 4.0  # what ten times the rows may add to a constant memory
LIMIT_S = 3.0

Batches = list[Any]
Made = tuple[Fold[Any, Any, Any], Batches]


def run(quick: bool) -> dict[str, Any]:
    """Seconds and memory of every fold, of the quantile and of the p-values."""
    return measured(QUICK_ROWS if quick else ROWS, ASKED)


def measured(rows: int, asked: int, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The figures for ``rows`` rows or scores and ``asked`` p-values, of the folds ``names``."""
    table: dict[str, dict[str, Any]] = {}
    for name in names or tuple(FOLDS):
        table[name] = one = _alone(_fold, name, rows)
        added = one["peak_mb"] - one["peak_mb_tenth"]
        one["constant"] = added < CONSTANT_MB
        print(f"{name}: {one['seconds']:.2f} s, {added:+.1f} MB", file=sys.stderr, flush=True)
    kept = table.pop("exact_ranking", None)
    found: dict[str, Any] = {
        "rows": rows,
        "seconds_10m_rows": sum(r["seconds"] for r in table.values()) * ROWS / rows,
        "constant_memory": all(r["constant"] for r in table.values()),
        "folds": table,
    }
    if kept is not None:
        found["exact_ranking"] = {**_alone(_exact, rows), "seconds_to_keep": kept["seconds"]}
    few, many = _alone(_thresholds, rows // 10, asked), _alone(_thresholds, rows, asked)
    found["quantile_seconds"] = max(many["quantile"].values())
    found["pvalue_seconds"] = many["pvalue"]["table"] + many["pvalue"]["rows"]
    found["pvalue_exact_seconds"] = many["pvalue"]["exact"]
    found["within_3_s"] = all(
        found[k] < LIMIT_S for k in ("quantile_seconds", "pvalue_seconds", "pvalue_exact_seconds")
    )
    found["thresholds"] = {"asked": asked, "tenth": few, "all": many}
    return found


def _fold(name: str, rows: int) -> dict[str, float]:
    """Seconds of one fold over ``rows`` rows, its peak memory there and over a tenth of them."""
    fold, batches = FOLDS[name]()
    _folded(fold, batches, len(batches) * BATCH)
    _, _, tenth = _folded(fold, batches, rows // 10)
    done, seconds, peak = _folded(fold, batches, rows)
    return {
        "seconds": seconds,
        "rows_per_second": done / seconds,
        "peak_mb_tenth": tenth,
        "peak_mb": peak,
    }


def _folded(fold: Fold[Any, Any, Any], batches: Batches, rows: int) -> tuple[int, float, float]:
    """(rows, seconds, peak megabytes) of one fold over whole batches."""
    base, started = _reset(), time.perf_counter()
    state, done, i = fold.init(), 0, 0
    while done < rows:
        state = fold.update(state, batches[i % len(batches)])
        done, i = done + BATCH, i + 1
    fold.result(state)
    return done, time.perf_counter() - started, _peak() - base


def _exact(rows: int) -> dict[str, float]:
    """What the exact ranking keeps, and the seconds of its figures from it."""
    rng = np.random.default_rng(0)
    state = exact_ranking.init()
    for _ in range(-(-rows // BATCH)):
        scores = rng.standard_normal(BATCH)
        batch = {"negatives": scores[BATCH // 10 :], "positives": scores[: BATCH // 10] + 1}
        state = exact_ranking.update(state, batch)
    found: dict[str, float] = {"bytes_per_row": state.nbytes / state.n}
    for figure in ("auroc", "aupr", "fpr95", "risk_coverage"):
        started = time.perf_counter()
        getattr(state, figure)
        found[f"{figure}_seconds"] = time.perf_counter() - started
    return found


def _thresholds(n: int, asked: int) -> dict[str, Any]:
    """Seconds and bytes a score of the conformal quantile of n scores and of p-values."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(n, dtype=np.float32)
    fresh = rng.standard_normal(asked, dtype=np.float32)
    pieces = np.array_split(scores, max(1, n // 1_000_000))
    rank = conformal_rank(n, ALPHA)
    ways: dict[str, Callable[[], float]] = {
        "sort": lambda: threshold_at(np.sort(scores), ALPHA),
        "partition": lambda: float(np.partition(scores, rank - 1)[rank - 1]),
        "two_passes": lambda: float(order_statistics(pieces, lambda _: [rank])[0]),
    }
    seconds, memory, answers = {}, {}, set()
    for way, found in ways.items():
        base, started = _reset(), time.perf_counter()
        answers.add(found())
        seconds[way] = time.perf_counter() - started
        memory[way] = (_peak() - base) * 1e6 / n
    if len(answers) > 1:
        raise AssertionError(f"the ways to one quantile disagree: {answers}")
    base, started = _reset(), time.perf_counter()
    table, p = pvalue_table(scores)
    made = time.perf_counter()
    by_table = pvalues(table, p, fresh)
    looked_up = time.perf_counter()
    by_rank = (1 + n - np.searchsorted(np.sort(scores), fresh, side="left")) / (n + 1)
    ended = time.perf_counter()
    memory["pvalues"] = (_peak() - base) * 1e6 / n
    if (by_table < by_rank - 1e-12).any():
        raise AssertionError("a p-value of the table is below the exact one")
    return {
        "scores": n,
        "quantile": seconds,
        "pvalue": {"table": made - started, "rows": looked_up - made, "exact": ended - looked_up},
        "bytes_per_score": memory,
    }


def _alone(work: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """The work in a process of its own, so that no other one's memory is counted."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def _reset() -> float:
    """Forget the peak so far (Linux); the megabytes held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1000
    raise LookupError(field)


def _classes(seed: int) -> dict[str, Array]:
    """One batch of a classifier: probabilities, and all that goes with them."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((BATCH, CLASSES), dtype=np.float32) * 2
    probs = np.exp(z - z.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    y = (probs.cumsum(axis=1) > rng.random((BATCH, 1)) * 0.999).argmax(axis=1)
    label, sets = probs.argmax(axis=1), probs > 0.1
    return {
        "probs": probs,
        "y": y,
        "label": label,
        "confidence": probs.max(axis=1).astype(np.float64),
        "right": label == y,
        "set": sets,
        "covered": sets[np.arange(BATCH), y],
        "group": rng.integers(0, 50, BATCH),
    }


def _values(seed: int) -> dict[str, Array]:
    """One batch of a regression."""
    rng = np.random.default_rng(seed)
    std, mean = rng.gamma(2, 1, BATCH), rng.standard_normal(BATCH)
    y = mean + std * rng.standard_normal(BATCH)
    lower, upper = mean - 1.64 * std, mean + 1.64 * std
    return {"mean": mean, "std": std, "y": y, "lower": lower, "upper": upper}


def _made(
    fold: Fold[Any, Any, Any],
    draw: Callable[[int], Mapping[str, Array]],
    batch: Callable[[Mapping[str, Array]], Any],
) -> Made:
    return fold, [batch(draw(seed)) for seed in range(CYCLE)]


def _of(*names: str) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    return lambda drawn: {name: drawn[name] for name in names}


def _sides(drawn: Mapping[str, Array]) -> dict[str, Array]:
    wrong = ~drawn["right"]
    return {"negatives": -drawn["confidence"][~wrong], "positives": -drawn["confidence"][wrong]}


def _level(drawn: Mapping[str, Array]) -> dict[str, Any]:
    kept = _of("confidence", "label", "y", "probs", "covered")(drawn)
    return {**kept, "set_size": drawn["set"].sum(axis=1), "level": "0.9"}


def _errors(drawn: Mapping[str, Array]) -> dict[str, Array]:
    return {"squared_error": (drawn["y"] - drawn["mean"]) ** 2, "variance": drawn["std"] ** 2}


def _sizes(drawn: Mapping[str, Array]) -> dict[str, Array]:
    return {"error": np.abs(drawn["y"] - drawn["mean"]), "uncertainty": drawn["std"]}


FOLDS: dict[str, Callable[[], Made]] = {
    "classification_totals": lambda: _made(classification_totals, _classes, _level),
    "class_bins": lambda: _made(class_bins(CLASSES), _classes, _of("probs", "y")),
    "brier_parts": lambda: _made(brier_parts(CLASSES), _classes, _of("probs", "y")),
    "top_label_bins": lambda: _made(
        top_label_bins(CLASSES), _classes, _of("confidence", "label", "right")
    ),
    "equal_mass_bins": lambda: _made(
        confidence_bins(equal_mass_edges(_classes(CYCLE)["confidence"])),
        _classes,
        _of("confidence", "right"),
    ),
    "smooth_ece": lambda: _made(smooth.smooth_totals, _classes, _of("confidence", "right")),
    "ks_error": lambda: _made(ks.ks_totals, _classes, _of("confidence", "right")),
    "set_sizes": lambda: _made(set_sizes(CLASSES), _classes, _of("set", "y")),
    "group_coverage": lambda: _made(
        conditional_coverage.group_counts, _classes, _of("covered", "group")
    ),
    "ranking_histogram": lambda: _made(ranking_histogram(-1.0, 0.0), _classes, _sides),
    "exact_ranking": lambda: _made(exact_ranking, _classes, _sides),
    "regression_totals": lambda: _made(regression_totals, _values, lambda d: {**d, "level": "0.9"}),
    "pit_totals": lambda: _made(
        regression.pit_totals,
        _values,
        lambda d: regression.gaussian_pit(d["mean"], d["std"], d["y"]),
    ),
    "variance_bins": lambda: _made(
        variance_bins(equal_mass_edges(_errors(_values(CYCLE))["variance"])), _values, _errors
    ),
    "correlation": lambda: _made(correlation.pooled_moments, _values, _sizes),
    "interval_totals": lambda: _made(
        interval.interval_totals(ALPHA), _values, _of("lower", "upper", "y")
    ),
    "sharpness": lambda: _made(interval.sharpness, _values, lambda d: d["std"]),
}
