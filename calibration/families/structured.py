"""Vector and matrix scaling with a ridge, in the form that shrinks to temperature scaling.

softmax((I + diag v + M) x + b) of x, the log-probabilities after temperature scaling mixed with the
uniform ones at weight 1 / (n + 1). The ridge is (k/n)(|b|² + |v|²) + (k(k-1)/n)|M|², M without a
diagonal, so that few rows leave the temperature alone and many rows free the matrix (Berta,
Holzmüller, Jordan & Bach 2025, "Structured matrix scaling for multi-class calibration").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from calibration.families.smallest import LEAST, bounded
from posthoc.contract import F64, Array
from posthoc.folds import log_softmax

if TYPE_CHECKING:
    from posthoc.graph import Fragment

STEPS = 500


def mixed(log_p: Array, mix: float) -> F64:
    """log of (1 - mix) p + mix / C."""
    x = bounded(log_p)
    return np.asarray(np.logaddexp(x + np.log1p(-mix), np.log(mix / x.shape[-1])))


def objective(
    x: F64, y: Array, matrix: bool, ridge: float = 1.0
) -> Callable[[Array], tuple[float, F64]]:
    """The penalised mean negative log-likelihood in nats and its gradient, of parameters (v or
    I-less matrix, row by row; then b)."""
    n, k = x.shape
    of_bias, of_rest = ridge * k / n, ridge * k * (k - 1) / n
    diagonal = np.eye(k, dtype=bool)
    penalty = np.where(diagonal, of_bias, of_rest)
    rows = np.arange(n)

    def value(parameters: Array) -> tuple[float, F64]:
        b = parameters[-k:]
        w = parameters[:-k].reshape(k, k) if matrix else parameters[:-k]
        z = x + (x @ w.T if matrix else x * w) + b
        log_norm = logsumexp(z, axis=1)
        residual = np.exp(z - log_norm[:, None])
        residual[rows, y] -= 1.0
        residual /= n
        loss = float((log_norm - z[rows, y]).mean()) + of_bias * float(b @ b)
        by_b = residual.sum(0) + 2 * of_bias * b
        if matrix:
            by_w = residual.T @ x + 2 * penalty * w
            return loss + float((penalty * w**2).sum()), np.append(by_w.ravel(), by_b)
        by_v = (residual * x).sum(0) + 2 * of_bias * w
        return loss + of_bias * float(w @ w), np.append(by_v, by_b)

    return value


def fit(log_p: Array, y: Array, matrix: bool, ridge: float = 1.0) -> dict[str, Array]:
    """``weight`` C×C (vector scaling: C), ``bias`` C and ``mix`` of log-probabilities N×C, classes
    N. The objective is convex, so that the start does not matter: it is the temperature."""
    n, k = log_p.shape
    mix = 1.0 / (n + 1)
    x = mixed(log_p, mix)
    size = k * k if matrix else k
    found = minimize(
        objective(x, y, matrix, ridge),
        np.zeros(size + k),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": STEPS},
    ).x
    weight = found[:size].reshape(k, k) if matrix else found[:size]
    return {"weight": weight, "bias": found[size:], "mix": np.asarray([mix])}


def apply(tensors: Mapping[str, Array], log_p: Array) -> F64:
    """The map of log-probabilities …×C."""
    x, w = mixed(log_p, float(tensors["mix"][0])), tensors["weight"]
    moved = x @ w.T if w.ndim == 2 else x * w
    return log_softmax(x + moved + tensors["bias"])


def emit(g: Fragment, tensors: Mapping[str, Array], log_p: str) -> str:
    """The same as a graph fragment."""
    w, b, mix = tensors["weight"], tensors["bias"], float(tensors["mix"][0])
    p = g.op("Exp", g.op("Max", log_p, g.const(LEAST)))
    uniform = g.const(mix / len(b))
    x = g.op("Log", g.op("Add", g.op("Mul", p, g.const(1.0 - mix)), uniform))
    if w.ndim == 2:
        moved = g.op("MatMul", x, g.const(np.ascontiguousarray(w.T + np.eye(len(b)))))
    else:
        moved = g.op("Mul", x, g.const(1.0 + w))
    return g.op("LogSoftmax", g.op("Add", moved, g.const(b)), axis=-1)
