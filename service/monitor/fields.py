"""Which streams of numbers the rows of a ledger are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from posthoc.contract import F64
from service.labels import Joined
from service.monitor.following import Predicted

Key = tuple[str, str]  # model, version
_NORMAL = NormalDist()
SERVED = ("confidence", "entropy", "set_size", "ood_pvalue", "label", "std", "ood", "abstain")


def served_streams(page: Predicted) -> dict[str, F64]:
    """What needs no label: of N predictions, by name. Of images ``ood`` and ``abstain`` are the
    shares of their pixels; of rows, for which they are one of two answers, they are no streams."""
    return {name: page.fields[name] for name in SERVED if name in page.fields}


def labelled_streams(rows: Sequence[Joined]) -> dict[Key, dict[str, F64]]:
    """What a label adds, by model and version and name, in order.

    ``error``: 1 where the prediction was wrong, else 0; of a regression the mean absolute error
    over its outputs. ``pit``, of a regression: mean over outputs of the probability that a normal
    distribution of its mean and std gives to less than the truth.
    """
    found: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        streams = found[row.model, row.version]
        if row.task == "classification":
            streams["error"].append(float(row.label != row.value))
        elif row.mean is not None and row.std is not None:
            gap = np.asarray(row.value) - np.frombuffer(row.mean, "<f4")
            streams["error"].append(float(np.abs(gap).mean()))
            ranks = [_NORMAL.cdf(z) for z in (gap / np.frombuffer(row.std, "<f4")).tolist()]
            streams["pit"].append(sum(ranks) / len(ranks))
    return {
        key: {name: np.array(values, np.float64) for name, values in streams.items()}
        for key, streams in found.items()
    }
