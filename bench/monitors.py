"""``python -m bench monitors``: false alarms of what is watched for ever, and how soon it sees.

False alarms are shares of healthy streams, each with a reference of its own, that ever alarm; the
limit is nominal + 3 sqrt(nominal (1 - nominal) / streams), for nominal 0.05 and 0.01. Martingales:
scores with and without ties; beside them the same bets on the p-value that is served, whose
reference is fixed: it is not uniform given its reference, and a long stream shows that. Risk
monitor: bundles calibrated on 1,000 rows at level 0.9, and streams whose coverage is the floor
itself; beside it a binomial test that is looked at after every label, as if it were the only one.
(Of tied scores the served p-value has few values, none of them drawn: bets on those mean nothing
and are left out.)

``delays``: observations from the change to the alarm at 0.01 (martingale) or 0.05 (risk monitor),
the median and the 90 % quantile over streams; ``found`` within the horizon. Labels that come in
groups are looked at when a group is full. ``per_second``: observations a second on one core, by
processor time.

``max_false_alarms_over_limit`` is the largest rate over its limit, at most 1.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import binom

from calibration.drift import martingale, risk_monitor, samples
from calibration.drift.distance import distance
from calibration.threshold import pvalue_table, pvalues
from posthoc.contract import F64, Array

NOMINAL = (0.05, 0.01)
STREAMS, QUICK_STREAMS = 2000, 200
LENGTH = 1000
ALPHA, ROWS = 0.1, 1000  # of the bundle whose coverage is watched

Draw = Callable[[np.random.Generator, int], F64]
SCORES: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "five values": lambda rng, n: rng.integers(0, 5, n).astype(np.float64),
    "nine of ten are 0": lambda rng, n: np.where(rng.random(n) < 0.9, 0.0, rng.random(n)),
}
CHANGES: dict[str, Callable[[F64], F64]] = {
    "mean + 0.25 sd": lambda x: x + 0.25,
    "mean + 0.5 sd": lambda x: x + 0.5,
    "mean + 1 sd": lambda x: x + 1.0,
    "mean + 2 sd": lambda x: x + 2.0,
    "spread x 1.5": lambda x: 1.5 * x,
    "spread x 0.5": lambda x: 0.5 * x,
}


def run(quick: bool) -> dict[str, Any]:
    """Rates beside their limits, delays, and speed."""
    streams = QUICK_STREAMS if quick else STREAMS
    null = []
    for kind in SCORES:
        for n in (200, 1000):
            null.append(martingale_null(kind, n, streams))
            _say(f"martingale, {kind}, {n}")
    risk = [risk_null(case, streams) for case in ("bundles", "bundles, tolerance 0", "edge")]
    _say("risk monitor")
    clean = (0, 1000) if quick else (0, 1000, 10_000)
    delays = [martingale_delay(c, t, 20 if quick else 50) for c in CHANGES for t in clean]
    _say("delays of the martingale")
    shares = (0.5, 0.8) if quick else (0.5, 0.7, 0.8, 0.84)
    late = [risk_delay(c, g, 20 if quick else 100) for c in shares for g in (1, 10, 100, 1000)]
    sure = [
        (row[who][str(a)], row["limits"][str(a)])
        for row, who in (*((r, "martingale") for r in null), *((r, "risk_monitor") for r in risk))
        for a in NOMINAL
    ]
    return {
        "streams": streams,
        "length": LENGTH,
        "max_false_alarms_over_limit": max(rate / limit for rate, limit in sure),
        "false_alarms": {"martingale": null, "risk_monitor": risk},
        "delays": {"martingale": delays, "risk_monitor": late},
        "per_second": speeds(quick),
    }


def martingale_null(kind: str, n: int, streams: int) -> dict[str, Any]:
    """Alarms of healthy streams, by ranks among all and by the served p-value."""
    ours, fixed = [], []
    for seed in range(streams):
        x = SCORES[kind](np.random.default_rng(seed), n + LENGTH)
        fresh = martingale.start(x[:n], seed=seed)
        ours.append(martingale.run(fresh, x[n:])[0])
        if kind == "normal":
            served = pvalues(*pvalue_table(x[:n]), x[n:])
            fixed.append(martingale.bet(fresh, served)[0])
    row = {"scores": kind, "reference": n, "martingale": _alarms(ours), "limits": _limits(streams)}
    return row | ({"fixed_reference": _alarms(fixed)} if fixed else {})


def risk_null(case: str, streams: int) -> dict[str, Any]:
    """Alarms of healthy bundles, or (``edge``) of streams with nothing to spare."""
    tolerance = risk_monitor.TOLERANCE if case == "bundles" else 0.0
    ours, naive = dict.fromkeys(NOMINAL, 0), dict.fromkeys(NOMINAL, 0)
    seen = np.arange(1, LENGTH + 1)
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        coverage = 1 - ALPHA if case == "edge" else rng.beta(901, 100)
        covered = rng.random(LENGTH) < coverage
        upto = np.cumsum(covered)
        for a in NOMINAL:
            state = risk_monitor.watch_level(ALPHA, ROWS, tolerance=tolerance, error=a)
            if case == "edge":
                state = risk_monitor.start(coverage, a)
            ours[a] += risk_monitor.run(state, covered)[0].alarm
            naive[a] += bool((binom.cdf(upto, seen, state.floor)[29:] <= state.error).any())
    return {
        "case": case,
        "risk_monitor": {str(a): ours[a] / streams for a in NOMINAL},
        "binomial_after_every_label": {str(a): naive[a] / streams for a in NOMINAL},
        "limits": _limits(streams),
    }


def martingale_delay(change: str, clean: int, streams: int) -> dict[str, Any]:
    """From a change after ``clean`` healthy scores; the reference has 1,000."""
    horizon, found = 2000, []
    for seed in range(streams):
        x = np.random.default_rng(seed).normal(size=1000 + clean + horizon)
        state, path = martingale.run(martingale.start(x[:1000], seed=seed), x[1000 : 1000 + clean])
        _, path = martingale.run(state, CHANGES[change](x[1000 + clean :]))
        found.append(_first(path >= 2))
    return {"change": change, "after": clean, **_delays(found, horizon)}


def risk_delay(coverage: float, group: int, streams: int) -> dict[str, Any]:
    """From the first label on, of a bundle whose coverage is lost; labels come in groups."""
    horizon, found = 10_000, []
    state = risk_monitor.watch_level(ALPHA, ROWS)
    for seed in range(streams):
        covered = np.random.default_rng(seed).random(horizon) < coverage
        _, path = risk_monitor.run(state, covered)
        # The evidence depends on counts alone: at the end of a group it is that of single rows.
        at = _first(path[group - 1 :: group] >= -math.log10(state.error))
        found.append(None if at is None else at * group)
    return {"coverage": coverage, "floor": state.floor, "group": group, **_delays(found, horizon)}


def speeds(quick: bool) -> dict[str, float]:
    """Observations a second of one core; of distances, pairs of 20 bins."""
    rng = np.random.default_rng(0)
    n = 50_000 if quick else 300_000
    x, covered = rng.normal(size=n), rng.random(n) < 0.9
    probs = rng.dirichlet(np.full(10, 0.1), n)
    bins = rng.integers(1, 99, (2, 20))
    ranked, watched = martingale.start(x[:1000]), risk_monitor.watch_level(ALPHA, ROWS)

    def batches() -> None:
        state = ranked
        for part in np.split(x, n // 100):
            state, _ = martingale.run(state, part)

    def distances() -> None:
        for _ in range(1000):
            distance(*bins)

    return {
        "martingale": n / _seconds(lambda: martingale.run(ranked, x)),
        "martingale_batches_of_100": n / _seconds(batches),
        "risk_monitor": n / _seconds(lambda: risk_monitor.run(watched, covered)),
        "samples_10_classes": n / _seconds(lambda: samples.update(samples.start(10), probs)),
        "distances": 1000 / _seconds(distances),
    }


def _seconds(work: Callable[[], object]) -> float:
    """Processor seconds, the best of three."""
    found = []
    for _ in range(3):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def _alarms(states: list[martingale.Martingale]) -> dict[str, float]:
    return {str(a): float(np.mean([s.alarm(a) for s in states])) for a in NOMINAL}


def _limits(streams: int) -> dict[str, float]:
    return {str(a): a + 3 * math.sqrt(a * (1 - a) / streams) for a in NOMINAL}


def _first(hit: Array) -> int | None:
    """Observations up to and including the first hit."""
    return int(np.argmax(hit)) + 1 if hit.any() else None


def _delays(found: list[int | None], horizon: int) -> dict[str, Any]:
    delays = [horizon + 1 if d is None else d for d in found]
    median, most = np.quantile(delays, [0.5, 0.9], method="inverted_cdf")
    return {
        "median": None if median > horizon else int(median),
        "q90": None if most > horizon else int(most),
        "found": float(np.mean([d is not None for d in found])),
        "horizon": horizon,
    }


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
