"""Which streams of numbers the rows of a ledger are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from posthoc.contract import F64
from service.labels import Joined
from service.monitor.following import Predicted

Key = tuple[str, str]  # model, version
SERVED = ("confidence", "entropy", "set_size", "ood_pvalue", "std")


def served_streams(page: Predicted) -> dict[str, F64]:
    """What needs no label: of N predictions, by name."""
    return {name: page.fields[name] for name in SERVED if name in page.fields}


def error_streams(rows: Sequence[Joined]) -> dict[Key, F64]:
    """By model and version, in order: 1 where a label says that the prediction was wrong, else 0;
    of a regression the mean absolute error over its outputs."""
    found: dict[Key, list[float]] = defaultdict(list)
    for row in rows:
        found[row.model, row.version].append(_error(row))
    return {key: np.array(values, np.float64) for key, values in found.items()}


def _error(row: Joined) -> float:
    if row.task == "classification":
        return float(row.label != row.value)
    if row.mean is None:
        return float("nan")
    return float(np.abs(np.frombuffer(row.mean, "<f4") - np.asarray(row.value)).mean())
