"""Which family is taken: the one whose gain over temperature scaling is sure.

Five folds of the calibration rows; each family is fitted on four and its negative log-likelihood
on the fifth is held against the temperature's, row by row. One is taken only where the mean gain
has a one-sided 95 % lower bound above 0, shared over the families tried (Bonferroni), and of those
the one with the largest gain. Rows of one item, which share a key, stand in one fold and count as
one: the standard error is that of sums over items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from calibration.families.family import BINARY, FAMILIES, apply_family, fit_family
from posthoc.contract import Array

FOLDS = 5
SURE = 0.95
# Of classes: a matrix has C² numbers and a fit of them takes some hundred passes over N×C².
MOST_CLASSES = 100
ROWS_A_CLASS = 5  # of calibration rows, on the average, before a family is tried


@dataclass(frozen=True, slots=True)
class Gain:
    """Mean gain of a family over the temperature in nats a row, cross-validated, and its lower
    bound."""

    name: str
    gain: float
    low: float


def candidates(rows: int, classes: int) -> tuple[str, ...]:
    """The families worth trying on so many calibration rows."""
    if rows < max(2 * FOLDS, ROWS_A_CLASS * classes):
        return ()
    names = [n for n in FAMILIES if classes == 2 or n not in BINARY]
    return tuple(n for n in names if n != "sms" or 2 < classes <= MOST_CLASSES)


def gains(
    log_p: Array, y: Array, names: tuple[str, ...], seed: int = 0, keys: Array | None = None
) -> tuple[Gain, ...]:
    """The gain of each family on log-probabilities N×C and classes N of rows with keys N, by
    default each row its own; of fewer items than folds none."""
    n = len(y)
    item = np.unique(np.arange(n) if keys is None else keys, return_inverse=True)[1]
    items = int(item.max(initial=-1)) + 1
    if items < FOLDS:
        return ()
    fold = (np.random.default_rng(seed).permutation(items) % FOLDS)[item]
    found = []
    for name in names:
        difference = np.empty(n)
        for k in range(FOLDS):
            here = fold == k
            family = fit_family(name, log_p[~here], y[~here])
            made = apply_family(family, log_p[here])
            at = np.arange(int(here.sum())), y[here]
            difference[here] = made[at] - log_p[here][at]
        mean = float(difference.mean())
        sums = np.bincount(item, difference - mean)
        error = math.sqrt(items / (items - 1) * float(sums @ sums)) / n
        bound = float(student.ppf(1 - (1 - SURE) / len(names), items - 1)) * error
        found.append(Gain(name, mean, mean - bound))
    return tuple(found)


def chosen(tried: tuple[Gain, ...]) -> str | None:
    """The family with the largest gain of those that surely have one; None for the temperature."""
    sure = [g for g in tried if g.low > 0]
    return max(sure, key=lambda g: g.gain).name if sure else None
