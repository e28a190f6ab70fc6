"""Several systems on the same rows: paired differences to the best one, by Holm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.metrics.bootstrap import N_BOOT, Estimate, row_weights
from posthoc.contract import F64, Array, DataError


def holm(p_values: Sequence[float] | Array) -> F64:
    """Adjusted p-values of M tests, in their order: at most a where the test holds at level a
    for all M together (Holm 1979, "A simple sequentially rejective multiple test procedure").

    Raises DataError for a p-value outside [0, 1] or NaN.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise DataError("p-values are M numbers in [0, 1]")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    factor = len(p) - np.arange(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factor))
    return adjusted


@dataclass(frozen=True, slots=True)
class Compared:
    """Mean loss of one system less that of the best, and the two-sided p-value of no difference
    after Holm's adjustment; the best itself has 0 and 1."""

    difference: Estimate
    p_value: float


def against_best(
    losses: Mapping[str, Array],
    *,
    groups: Array | None = None,
    n_boot: int = N_BOOT,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Compared]:
    """Each system's mean loss less that of the best one, by the paired bootstrap.

    ``losses`` holds N per-row losses by system, lower is better; rows, or ``groups`` (N) of them,
    are resampled, and all systems share the resamples. The interval is the percentile one, the
    p-value ``2 (1 + #{difference <= 0}) / (n_boot + 1)``, at most 1. The best was found on these
    same rows: its own figures belong on others. Raises DataError for no system, no rows, lengths
    that differ, and losses that are not finite.
    """
    if not losses or len({len(v) for v in losses.values()}) != 1:
        lengths = {k: len(v) for k, v in losses.items()}
        raise DataError(f"systems to compare have losses of the same rows, not {lengths}")
    names = list(losses)
    table = np.stack([np.asarray(losses[n], dtype=np.float64) for n in names], axis=1)
    if not np.isfinite(table).all():
        bad = names[int(np.argmin(np.isfinite(table).all(axis=0)))]
        raise DataError(f"{bad}: a loss is no finite number")
    weights = row_weights(len(table), groups=groups, n_boot=n_boot, seed=seed)
    drawn = np.array([w @ table / w.sum() for w in weights])
    mean = table.mean(axis=0)
    best = int(np.argmin(mean))
    apart = drawn - drawn[:, [best]]
    low, high = np.quantile(apart, [(1 - level) / 2, (1 + level) / 2], axis=0)
    others = [i for i in range(len(names)) if i != best]
    p = np.minimum(1.0, 2 * (1 + (apart[:, others] <= 0).sum(axis=0)) / (n_boot + 1))
    adjusted = dict(zip(others, holm(p), strict=True))
    return {
        name: Compared(
            Estimate(float(mean[i] - mean[best]), float(low[i]), float(high[i])),
            float(adjusted.get(i, 1.0)),
        )
        for i, name in enumerate(names)
    }
