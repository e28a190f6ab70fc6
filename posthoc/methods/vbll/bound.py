"""Lower bounds of E[log softmax(f)_y] for independent Gaussian logits f, in closed form.

With means m and variances v, E[logsumexp(f)] <= 1/2 sum_k a_k² v_k + logsumexp_k(m_k + (1 - 2 a_k)
v_k / 2) for every a (the tilted bound of Knowles & Minka 2011, "Non-conjugate variational message
passing for multinomial and binary regression"). At a = 0 it is Jensen's, which the VBLL paper uses.
Jensen's counts a variance that all classes share as a loss of v / 2 although softmax does not see
it, and with many features it is maximal where there is no variance at all. The best a, which is
softmax(m + (1 - 2 a) v / 2), removes that, and its curvature p (1 - p) is Laplace's. Both bounds
are exact at zero variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from posthoc.contract import F64, I64
from posthoc.folds import log_softmax

Bound = Literal["tilted", "jensen"]
STEPS = 4  # Newton steps over a, each with a diagonal Hessian


@dataclass(frozen=True, slots=True)
class Softmax:
    """The bound of N rows: its values N and, N×C each, minus its derivatives by the means except
    for the label's own 1 (``mean``) and minus twice those by the variances (``variance``)."""

    value: F64
    mean: F64
    variance: F64


def softmax_bound(m: F64, v: F64, y: I64, kind: Bound) -> Softmax:
    """The bound of log p(y) under logits with means m and variances v, N×C, for labels y N."""
    tilt = np.zeros_like(m) if kind == "jensen" else _tilt(m, v)
    own = np.arange(len(y)), y
    more = (0.5 - tilt) * v
    log_q = log_softmax(m + more)
    # The difference of a mean and a logsumexp, without taking one from the other.
    value = log_q[own] - more[own] - 0.5 * (tilt**2 * v).sum(1)
    q = np.exp(log_q)
    return Softmax(value, q, (tilt - q) ** 2 + q * (1.0 - q))


def _upper(m: F64, v: F64, tilt: F64) -> tuple[F64, F64]:
    """(bound of E[logsumexp] N, its softmax N×C) for a given tilt."""
    moved = m + (0.5 - tilt) * v
    log_q = log_softmax(moved)
    total = moved[:, 0] - log_q[:, 0] + 0.5 * (tilt**2 * v).sum(1)
    return total, np.exp(log_q)


def _tilt(m: F64, v: F64) -> F64:
    """The tilt N×C that makes the bound tight: convex, by Newton steps that a row halves twice
    where its bound has risen. Any tilt gives a bound, so that few steps are enough."""
    best = np.exp(log_softmax(m))
    least, q = _upper(m, v, best)
    step = np.ones((len(m), 1))
    for _ in range(STEPS):
        trial = best + step * (q - best) / (1.0 + v * q * (1.0 - q))
        total, trial_q = _upper(m, v, trial)
        better = (total <= least)[:, None]
        best, q = np.where(better, trial, best), np.where(better, trial_q, q)
        least = np.minimum(least, total)
        step = np.where(better, 1.0, step / 4)
    return best
