"""Bootstrap intervals over rows, or over groups where rows come in groups.

Every interval here resamples whole groups (a file and its truncations, an image's pixels, one
customer's rows), since rows of one group are no independent evidence. Without ``groups`` each row
is its own group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from posthoc.contract import F64, I64, Array, DataError

N_BOOT = 1000
_HELD = 2_000_000  # counts held at a time


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with the lower and upper end of its interval."""

    value: float
    low: float
    high: float


def group_codes(groups: Array | None, n: int) -> tuple[I64, int]:
    """Code of each row's group in 0…G-1, and G. None: every row by itself.

    Raises DataError when there are no rows or ``groups`` has another length than n.
    """
    if n == 0:
        raise DataError("an interval needs at least one row and there is none")
    if groups is None:
        return np.arange(n), n
    if len(groups) != n:
        raise DataError(f"groups has {len(groups)} rows where there are {n}")
    names, codes = np.unique(np.asarray(groups), return_inverse=True)
    return codes.astype(np.int64), len(names)


def row_weights(n: int, *, groups: Array | None, n_boot: int, seed: int) -> Iterator[F64]:
    """For each of ``n_boot`` resamples of the groups: how often each of the n rows was drawn."""
    codes, n_groups = group_codes(groups, n)
    for drawn in _draws(n_groups, n_boot, seed):
        yield drawn[codes].astype(np.float64)


def _draws(n_groups: int, n_boot: int, seed: int) -> Iterator[I64]:
    """For each resample: how often each group was drawn."""
    rng = np.random.default_rng(seed)
    for _ in range(n_boot):
        yield np.bincount(rng.integers(0, n_groups, n_groups), minlength=n_groups)


def mean_estimates(
    columns: Mapping[str, Array],
    *,
    groups: Array | None = None,
    n_boot: int = N_BOOT,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Estimate]:
    """Mean of each column of per-row figures (N each) with its percentile interval.

    Efron 1979, "Bootstrap methods: another look at the jackknife"; all columns share the
    resamples. For means only: a percentile interval of a figure that noise pushes one way, such
    as ECE, does not cover. Raises DataError for columns of different lengths.
    """
    n = len(next(iter(columns.values())))
    if any(len(c) != n for c in columns.values()):
        raise DataError(
            f"columns of different lengths: { {k: len(c) for k, c in columns.items()} }"
        )
    x = np.stack([np.asarray(c, dtype=np.float64) for c in columns.values()], axis=1)
    codes, n_groups = group_codes(groups, n)
    # Sums by group once, then many resamples in one product: a small product for each of them
    # costs more in threads that wait for each other than in sums.
    sums = np.stack([np.bincount(codes, c, n_groups) for c in (*x.T, np.ones(n))], axis=1)
    draws, means = _draws(n_groups, n_boot, seed), []
    while block := list(islice(draws, max(1, _HELD // n_groups))):
        total = np.array(block, dtype=np.float64) @ sums
        means.append(total[:, :-1] / total[:, -1:])
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], axis=0)
    value = x.mean(axis=0)
    return {
        name: Estimate(float(value[i]), float(low[i]), float(high[i]))
        for i, name in enumerate(columns)
    }


def paired_difference(
    a: Array,
    b: Array,
    *,
    n_boot: int = N_BOOT,
    seed: int = 0,
    groups: Array | None = None,
    level: float = 0.95,
) -> Estimate:
    """Mean of ``a - b``, two per-row losses (N) of the same rows, with its percentile interval.

    Below zero: a is better. Pairing removes what the rows have in common, so this interval is
    far narrower than the two losses' own. Raises DataError for lengths that differ.
    """
    if len(a) != len(b):
        raise DataError(f"a paired difference of {len(a)} and {len(b)} rows")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    estimates = mean_estimates(
        {"difference": difference}, groups=groups, n_boot=n_boot, seed=seed, level=level
    )
    return estimates["difference"]
