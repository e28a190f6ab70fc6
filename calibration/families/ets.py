"""Ensemble temperature scaling: a mixture of three tempered copies of the prediction.

w0 softmax(log p / t) + w1 p + w2 / C (Zhang, Kailkhura & Han 2020, arXiv:2003.07329). It keeps the
order of the classes; w1 = 1 is the temperature alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize_scalar

from calibration.families.smallest import LEAST, bounded
from posthoc.contract import F64, Array
from posthoc.folds import log_softmax

if TYPE_CHECKING:
    from posthoc.graph import Fragment

LOG_T = (-3.0, 3.0)  # of the second temperature, relative to the first
ROUNDS = 60
PRIOR = (0.1, 1.0, 0.1)  # rows that each part has beforehand: without a sign, the temperature


def fit(log_p: Array, y: Array) -> dict[str, Array]:
    """``weights`` (w0, w1, w2) and ``temperature`` t: weights by expectation-maximisation for each
    t that Brent's method tries."""
    rows = np.arange(len(y))

    def at(log_t: float) -> tuple[float, F64]:
        return _weights(_parts(log_p, np.exp(log_t))[:, rows, y])

    grid = np.linspace(*LOG_T, 9)
    best = int(np.argmin([at(u)[0] for u in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(lambda u: at(u)[0], bounds=around, method="bounded")
    log_t = float(found.x)
    return {"weights": at(log_t)[1], "temperature": np.exp([log_t])}


def apply(tensors: Mapping[str, Array], log_p: Array) -> F64:
    """The map of log-probabilities …×C."""
    parts = _parts(log_p, float(tensors["temperature"][0]))
    return np.asarray(np.log(np.tensordot(tensors["weights"], parts, axes=1)))


def emit(g: Fragment, tensors: Mapping[str, Array], log_p: str) -> str:
    """The same as a graph fragment."""
    w, t = tensors["weights"], float(tensors["temperature"][0])
    x = g.op("Max", log_p, g.const(LEAST))
    tempered = g.op("Softmax", g.op("Mul", x, g.const(1.0 / t)), axis=-1)
    own = g.op("Mul", g.op("Exp", x), g.const(float(w[1])))
    rest = g.op(
        "Div",
        g.const(float(w[2])),
        g.sum(g.op("Exp", g.op("Mul", x, g.const(0.0))), -1, keepdims=True),
    )
    total = g.op("Add", g.op("Mul", tempered, g.const(float(w[0]))), own)
    return g.op("Log", g.op("Add", total, rest))


def _parts(log_p: Array, t: float) -> F64:
    """The three parts 3×…×C."""
    x = bounded(log_p)
    tempered = np.exp(log_softmax(x / t))
    return np.stack([tempered, np.exp(x), np.full(x.shape, 1.0 / x.shape[-1])])


def _weights(likelihood: F64) -> tuple[float, F64]:
    """(penalised mean negative log-likelihood, weights 3) of the parts' likelihoods 3×N."""
    prior, n = np.asarray(PRIOR), likelihood.shape[1]
    w = prior / prior.sum()
    for _ in range(ROUNDS):
        share = w[:, None] * likelihood
        w = (share / share.sum(0)).sum(1) + prior
        w /= w.sum()
    loss = -float(np.log(w @ likelihood).sum()) - float(prior @ np.log(w))
    return loss / n, w
