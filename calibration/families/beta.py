"""Beta calibration of two classes (Kull, Silva Filho & Flach 2017, AISTATS 54).

logit p' = a log p - b log(1 - p) + c, a and b at least 0, so that the order of rows stays;
a = b = 1 and c = 0 is the temperature alone. A ridge of one row's worth holds it there where rows
say little.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from calibration.families.smallest import LEAST, bounded
from posthoc.contract import F64, Array
from posthoc.folds import log_softmax

if TYPE_CHECKING:
    from posthoc.graph import Fragment

RIDGE = 1.0  # of a - 1, b - 1 and c, in rows


def fit(log_p: Array, y: Array) -> dict[str, Array]:
    """``weights`` (a, b, c) of log-probabilities N×2 and classes N."""
    x = bounded(log_p)
    design = np.column_stack([x[:, 1], -x[:, 0], np.ones(len(x))])
    start, n = np.asarray([1.0, 1.0, 0.0]), len(x)

    def value(w: Array) -> tuple[float, F64]:
        z = design @ w
        loss = float((np.logaddexp(0.0, z) - y * z).mean())
        away = w - start
        slope = design.T @ (expit(z) - y) / n + 2 * RIDGE * away / n
        return loss + RIDGE * float(away @ away) / n, slope

    bounds = [(0.0, None), (0.0, None), (None, None)]
    return {"weights": minimize(value, start, jac=True, method="L-BFGS-B", bounds=bounds).x}


def apply(tensors: Mapping[str, Array], log_p: Array) -> F64:
    """The map of log-probabilities …×2."""
    a, b, c = tensors["weights"]
    x = bounded(log_p)
    return log_softmax(np.stack([b * x[..., 0], a * x[..., 1] + c], axis=-1))


def emit(g: Fragment, tensors: Mapping[str, Array], log_p: str) -> str:
    """The same as a graph fragment."""
    a, b, c = tensors["weights"]
    x = g.op("Max", log_p, g.const(LEAST))
    z = g.op("Add", g.op("Mul", x, g.const([float(b), float(a)])), g.const([0.0, float(c)]))
    return g.op("LogSoftmax", z, axis=-1)
