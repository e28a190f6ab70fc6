"""``python -m bench drift``: are changes of a stream found, and nothing else.

Streams of independent N(0, 1) points with one shift of the mean by 2, up or down in turn. Cells: no
outliers, and 2 % and 5 % of the points, of the reference too, replaced by ±10, by 5, by 10 (one
side only), or by N(0, 10²). Each of 200 runs a cell starts a detector on 200 reference points
(which it standardises by median and MAD itself), watches clean points, 1,000 in the cell without
outliers and 250 in each other, and then shifted ones. An alarm on clean points is false;
``false_alarms_per_1000`` is out of the clean points watched, those from which a detector learns
after a false alarm left out. ``found_within_30`` is the share of runs with an alarm on any of the
first 30 points after the shift, ``median_delay`` the point of the first, over runs where found.
Of a detector these are the worst over its cells; of the whole, those of the default detector.
At most 1 and at least .8 are asked for. Settings were chosen on other seeds (1,000 and above).

Beside it, without a gate and without outliers: shifts of 1 only, and deviations that double or
halve, found within 50 points; and AR(1) streams of coefficient .5 with a shift by one standard
deviation, point by point and as means of 10 (the unit is then the mean).
``observations_per_second`` is on clean points of one dimension, by the processor's time of one
core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from scipy.signal import lfilter

from calibration.drift.detector import DEFAULT, Detector, detector
from calibration.drift.detector import run as watch
from posthoc.contract import F64

RUNS, QUICK_RUNS = 200, 20
REFERENCE, WITHIN, SLOW = 200, 30, 50
CLEAN, CLEAN_WITH_OUTLIERS, CLEAN_BESIDE = 1000, 250, 100  # points of a run before its change
QUICK_CLEAN = 60
SHIFT = 2.0
LIMIT_FALSE, LIMIT_FOUND = 1.0, 0.8
RATES = 0.02, 0.05
KINDS: dict[str, Callable[[np.random.Generator, int], F64]] = {
    "±10": lambda rng, n: rng.choice([-10.0, 10.0], n),
    "5": lambda rng, n: np.full(n, 5.0),
    "10": lambda rng, n: np.full(n, 10.0),
    "N(0, 10²)": lambda rng, n: rng.normal(0, 10, n),
}
CELLS = (("none", 0.0), *((kind, rate) for rate in RATES for kind in KINDS))
ROBUST = {"contamination": 0.05, "clip": 5.0, "hazard": 1 / 1000, "least": 5}
PLAIN = {"contamination": 0.0, "clip": 1e6, "hazard": 1 / 200, "least": 7, "threshold": 0.99}
SIDES: dict[str, tuple[str, dict[str, Any]]] = {  # row of the table: detector, settings
    "cusum": ("cusum", {}),
    "dsm": ("dsm", {}),
    "bocd": ("bocd", {}),
    "dsm, plain predictive": ("dsm", PLAIN),
    "bocd, contaminated predictive": ("bocd", ROBUST),
    "cusum, not clipped": ("cusum", {"clip": 1e6}),
}


@dataclass(frozen=True, slots=True)
class Stream:
    """Points of one run: reference, then clean ones, then those after the change."""

    reference: F64
    clean: F64
    changed: F64


def run(quick: bool) -> dict[str, Any]:
    """One row a detector."""
    table = []
    for name, (key, settings) in SIDES.items():
        table.append({"detector": name, **row(detector(key), settings, quick)})
        print(name, file=sys.stderr, flush=True)
    default = next(r for r in table if r["detector"] == DEFAULT)
    return {
        "default": DEFAULT,
        "runs": QUICK_RUNS if quick else RUNS,
        "false_alarms_per_1000": default["false_alarms_per_1000"],
        "limit_false_alarms_per_1000": LIMIT_FALSE,
        "found_within_30": default["found_within_30"],
        "least_found_within_30": LIMIT_FOUND,
        "table": table,
    }


def row(using: Detector, settings: dict[str, Any], quick: bool) -> dict[str, Any]:
    """All figures of one detector."""
    runs = QUICK_RUNS if quick else RUNS
    cells = []
    for place, (kind, rate) in enumerate(CELLS):
        clean = QUICK_CLEAN if quick else CLEAN_WITH_OUTLIERS if rate else CLEAN
        streams = (shifted(place, seed, kind, rate, clean) for seed in range(runs))
        cells.append({"kind": kind, "rate": rate, **figures(using, settings, streams, WITHIN)})
    clean = QUICK_CLEAN if quick else CLEAN_BESIDE
    others: dict[str, tuple[int, Callable[[int], Stream]]] = {
        "shift of 1": (SLOW, lambda seed: changed(seed, 1.0 if seed % 2 else -1.0, 1.0, clean)),
        "deviation doubles": (SLOW, lambda seed: changed(seed, 0.0, 2.0, clean)),
        "deviation halves": (SLOW, lambda seed: changed(seed, 0.0, 0.5, clean)),
        "autocorrelated, points": (WITHIN, lambda seed: autocorrelated(seed, 1, clean)),
        "autocorrelated, means of 10": (WITHIN, lambda seed: autocorrelated(seed, 10, clean)),
    }
    beside = {
        name: figures(using, settings, (make(seed) for seed in range(runs)), within)
        for name, (within, make) in others.items()
    }
    false = max(c["false_alarms_per_1000"] for c in cells)
    found = min(c["found"] for c in cells)
    return {
        "settings": settings,
        "false_alarms_per_1000": false,
        "found_within_30": found,
        "passes": false <= LIMIT_FALSE and found >= LIMIT_FOUND,
        "median_delay": median(c["median_delay"] for c in cells),
        "clean_points": sum(c["clean_points"] for c in cells),
        "observations_per_second": speed(using, settings, 0.3 if quick else 2.0),
        "cells": cells,
        "not_gated": beside,
    }


def figures(
    using: Detector, settings: dict[str, Any], streams: Iterator[Stream], within: int
) -> dict[str, Any]:
    """False alarms, and changes found among the first ``within`` points after them."""
    false, watched, delays, count = 0, 0, [], 0
    for s in streams:
        state, before = watch(using, using.start(s.reference, **settings), s.clean.tolist())
        false += sum(f.alarm for f in before)
        watched += sum(not f.learning for f in before)
        _, after = watch(using, state, s.changed[:within].tolist())
        delays += [next((i for i, f in enumerate(after, 1) if f.alarm), None)]
        count += 1
    hits = [d for d in delays if d is not None]
    return {
        "false_alarms_per_1000": 1000 * false / watched,
        "false_alarms": false,
        "clean_points": watched,
        "found": len(hits) / count,
        "median_delay": median(hits) if hits else within + 1,
    }


def shifted(place: int, seed: int, kind: str, rate: float, clean: int) -> Stream:
    """A run of a cell, by its place among `CELLS`."""
    rng = np.random.default_rng([seed, place])
    x = rng.normal(size=REFERENCE + clean + WITHIN)
    x[REFERENCE + clean :] += SHIFT if seed % 2 else -SHIFT
    if rate:
        x = np.where(rng.random(len(x)) < rate, KINDS[kind](rng, len(x)), x)
    return _parts(x, clean)


def changed(seed: int, shift: float, factor: float, clean: int) -> Stream:
    """A run whose mean moves by ``shift`` and whose standard deviation by ``factor``."""
    x = np.random.default_rng([seed, len(CELLS)]).normal(size=REFERENCE + clean + SLOW)
    x[REFERENCE + clean :] = x[REFERENCE + clean :] * factor + shift
    return _parts(x, clean)


def autocorrelated(seed: int, window: int, clean: int) -> Stream:
    """A run of means over ``window`` points of a stationary AR(1), variance 1, coefficient .5."""
    rng = np.random.default_rng([seed, len(CELLS) + window])
    n = (REFERENCE + clean + WITHIN) * window
    noise = rng.normal(size=n) * np.sqrt(1 - 0.25)
    noise[0] /= np.sqrt(1 - 0.25)
    x = np.asarray(lfilter([1.0], [1.0, -0.5], noise))
    x[(REFERENCE + clean) * window :] += 1.0 if seed % 2 else -1.0
    return _parts(x.reshape(-1, window).mean(axis=1), clean)


def speed(using: Detector, settings: dict[str, Any], seconds: float) -> float:
    """Observations a second on clean points, the median of rounds of 1,000."""
    rng = np.random.default_rng(0)
    state = using.start(rng.normal(size=REFERENCE), **settings)
    state, _ = watch(using, state, rng.normal(size=200).tolist())
    xs: list[float] = rng.normal(size=1000).tolist()
    rates: list[float] = []
    ends = time.process_time() + seconds
    while not rates or time.process_time() < ends:
        started = time.process_time()
        watch(using, state, xs)
        rates.append(len(xs) / (time.process_time() - started))
    return median(rates)


def _parts(x: F64, clean: int) -> Stream:
    return Stream(x[:REFERENCE], x[REFERENCE : REFERENCE + clean], x[REFERENCE + clean :])
