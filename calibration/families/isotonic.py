"""Isotonic regression of two classes (Zadrozny & Elkan 2002), smoothed so that it has a likelihood.

The pool-adjacent-violators step function of the second class's log odds; a step of n rows with k
positives says (k + p) / (n + 1), p its rows' mean prediction, so that no step is 0 or 1. Between
the middles of steps it is linear in the log odds: strictly rising scores keep their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import isotonic_regression

from calibration.families.smallest import LEAST, bounded
from posthoc.contract import F64, Array
from posthoc.folds import log_softmax

if TYPE_CHECKING:
    from posthoc.graph import Fragment

TINY = 1e-12
# Of log odds: equal rows of unlike batches differ by rounding, which must not order them.
DIGITS = 4


def fit(log_p: Array, y: Array) -> dict[str, Array]:
    """Knots of the log odds: ``x`` ascending and ``y``, of log-probabilities N×2 and classes N."""
    x = bounded(log_p)
    odds = x[:, 1] - x[:, 0]
    p = np.exp(log_softmax(x))[:, 1]
    order = np.argsort(odds, kind="stable")
    values, index = np.unique(odds[order].round(DIGITS), return_inverse=True)
    rows = np.bincount(index).astype(np.float64)
    means = np.bincount(index, np.asarray(y, np.float64)[order]) / rows
    steps = isotonic_regression(means, weights=rows).blocks
    ends = [slice(a, b) for a, b in pairwise(steps)]
    n = np.asarray([rows[s].sum() for s in ends])
    k = np.asarray([(rows * means)[s].sum() for s in ends])
    said = np.bincount(index, p[order])
    own = np.asarray([said[s].sum() for s in ends]) / n
    middle = np.asarray([(rows * values)[s].sum() for s in ends]) / n
    share = np.maximum.accumulate(np.clip((k + own) / (n + 1), TINY, 1 - TINY))
    return {"x": middle, "y": np.log(share) - np.log1p(-share)}


def apply(tensors: Mapping[str, Array], log_p: Array) -> F64:
    """The map of log-probabilities …×2; beyond the outer knots it moves on with slope one."""
    x = bounded(log_p)
    odds = x[..., 1] - x[..., 0]
    knots, values = tensors["x"], tensors["y"]
    inside = np.interp(odds, knots, values)
    beyond = odds - np.clip(odds, knots[0], knots[-1])
    return log_softmax(np.stack([np.zeros_like(odds), inside + beyond], axis=-1))


def emit(g: Fragment, tensors: Mapping[str, Array], log_p: str) -> str:
    """The same as a graph fragment: the line of the interval that the log odds fall in."""
    knots, values = tensors["x"], tensors["y"]
    slopes = np.concatenate([[1.0], np.diff(values) / np.diff(knots), [1.0]])
    starts = np.append(knots[:1], knots)
    levels = np.append(values[:1], values)
    x = g.op("Max", log_p, g.const(LEAST))
    odds = g.op("MatMul", x, g.const([[-1.0], [1.0]]))
    below = g.cast(g.op("Less", g.const(knots), odds), "float32")
    index = g.cast(g.sum(below, -1), "int64")
    line = [g.op("Gather", g.const(v), index, axis=0) for v in (slopes, starts, levels)]
    slope, start, level = (g.unsqueeze(name, -1) for name in line)
    z = g.op("Add", g.op("Mul", g.op("Sub", odds, start), slope), level)
    both = g.op("Concat", g.op("Mul", z, g.const(0.0)), z, axis=-1)
    return g.op("LogSoftmax", both, axis=-1)
