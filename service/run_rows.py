"""How many rows a run of a model should have: as many as make a row cheaper, and no more.

On a CPU many networks take as long for each of 64 rows as for one, or longer, since what the layers
hand on leaves the cache; then rows in one run only wait for each other. The number bounds what is
joined: the rows of one request stay together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import numpy as np

from posthoc.contract import Array

MOST_ROWS, MOST_BYTES = 256, 32 << 20  # of a run that is tried: the defaults of what is served
_BUDGET_S = 1.0
_HAND_OVER_S = 100e-6  # a run to the device's thread, and its answers back
_GAIN = 0.97  # of twice the rows: what takes more is no gain
_NEAR = 1.05
_REPEATS = 3, 2  # the least time counts: of three runs, or of two where one takes long
_LONG_S = 0.05


def best_rows(seconds: Callable[[int], float], most: int) -> int | None:
    """The fewest rows of a run that take at most 5 % more time a row than the best number; None
    where that was not found, because doubling still gained at ``most`` rows or when time was up.

    ``seconds`` runs so many rows and says how long that took. Numbers are doubled until that gains
    nothing twice.
    """
    costs: dict[int, float] = {}
    rows, spent, idle = 1, 0.0, 0
    while idle < 2:
        expected = costs.get(rows // 2, 0.0) * rows
        if rows > most or spent + expected > _BUDGET_S:
            if idle == 0:
                return None
            break
        took = [seconds(rows)]
        repeats = _REPEATS[took[0] > _LONG_S]
        took += [seconds(rows) for _ in range(repeats - 1)]
        spent += sum(took)
        costs[rows] = (min(took) + _HAND_OVER_S) / rows
        best = min([cost for n, cost in costs.items() if n < rows], default=np.inf)
        idle = 0 if costs[rows] < _GAIN * best else idle + 1
        rows *= 2
    least = min(costs.values())
    return min(n for n, cost in costs.items() if cost <= _NEAR * least)


def measure_rows(
    run: Callable[[Mapping[str, Array]], object], row: Mapping[str, Array], size: int
) -> int | None:
    """`best_rows` of ``run`` on copies of one row, which takes ``size`` bytes with its answer. A
    number of rows that fails, for want of memory or whatever else, is none to share a run by."""

    def seconds(rows: int) -> float:
        feed = {name: np.repeat(value, rows, axis=0) for name, value in row.items()}
        started = time.perf_counter()
        try:
            run(feed)
        except Exception:  # onnxruntime raises a dozen unrelated exception types
            if rows == 1:
                raise
            return math.inf
        return time.perf_counter() - started

    most = max(1, min(MOST_ROWS, MOST_BYTES // max(1, size)))
    return best_rows(seconds, most)
