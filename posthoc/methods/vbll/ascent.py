"""Coordinate ascent over the variances of a Bayesian linear regression with one output.

For given noise and prior variances the best q(w) = N(m, S) has a closed form, and given q so have
both variances. Each step tries MacKay's form of those updates, which has the same fixed point and
is far faster where the rows say little about most weights, and takes the plain form, which never
lowers the bound, where MacKay's does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64
from posthoc.methods.vbll.covariance import Kind, inverse
from posthoc.methods.vbll.sums import Problem

LIMIT, CLOSE = 500, 1e-9


@dataclass(frozen=True, slots=True)
class Weights:
    """q(w) over P weights: mean ``at`` P in the eigenbasis, its squared norm and the squared error
    that it leaves; of S the sums ``trace``, ``data`` = tr(S gram) and ``log_det``, and ``variance``
    P with ``reduction`` P×R, or for a dense S its ``spectrum`` P in the eigenbasis."""

    at: F64
    norm: float
    error: float
    trace: float
    data: float
    log_det: float
    variance: F64 | None = None
    reduction: F64 | None = None
    spectrum: F64 | None = None


def best_weights(
    task: Problem, output: int, noise: float, prior: float, kind: Kind, rank: int
) -> Weights:
    """The best q for the precision gram / noise + I / prior. The mean is that of the exact
    posterior, whatever S may be."""
    cross = task.cross[:, output]
    at = cross / (task.values + noise / prior)
    error = float(task.squares[output] - 2.0 * (at @ cross) + task.values @ at**2)
    mean = (at, float(at @ at), max(error, 0.0))
    if kind == "dense":
        s = 1.0 / (task.values / noise + 1.0 / prior)
        data, log_det = float(s @ task.values), float(np.log(s).sum())
        return Weights(*mean, float(s.sum()), data, log_det, spectrum=s)
    gram = np.diag(task.gram)
    s = 1.0 / (gram / noise + 1.0 / prior)
    if kind == "diagonal":
        trace, data, log_det = float(s.sum()), float(s @ gram), float(np.log(s).sum())
        return Weights(*mean, trace, data, log_det, variance=s)
    # The leading eigenvectors of the precision are the gram matrix's, whatever the variances.
    low = task.basis[:, -rank:] * np.sqrt(task.values[-rank:] / noise)
    rest = np.maximum(gram / noise - (low**2).sum(1), 0.0) + 1.0 / prior
    (s,), (u,), (log_det,) = inverse(rest[None], low[None])
    trace = float(s.sum() - (u**2).sum())
    data = float(s @ gram - (u * (task.gram @ u)).sum())
    return Weights(*mean, trace, data, float(log_det), variance=s, reduction=u)


@dataclass(frozen=True, slots=True)
class Found:
    """Noise and prior variance, the bound in nats, q, and the steps taken to get there."""

    noise: float
    prior: float
    elbo: float
    weights: Weights
    steps: int = 0


# (noise, prior) -> what is best there; and (found, MacKay's form?) -> the next (noise, prior).
Evaluate = Callable[[float, float], Found]
Update = Callable[[Found, bool], tuple[float, float]]


def climb(evaluate: Evaluate, update: Update, noise: float, prior: float) -> Found:
    """The variances at which the bound is maximal, from the given ones up."""
    here = evaluate(noise, prior)
    for step in range(1, LIMIT + 1):
        there = evaluate(*update(here, True))
        if there.elbo <= here.elbo:
            there = evaluate(*update(here, False))
        moved = max(
            abs(math.log(there.noise / here.noise)), abs(math.log(there.prior / here.prior))
        )
        if there.elbo > here.elbo:
            here = Found(there.noise, there.prior, there.elbo, there.weights, step)
        elif moved > CLOSE:
            break  # the low-rank form is no exact maximum, and a rounding error can end it
        if moved <= CLOSE:
            break
    return here


def divergence(weights: Weights, norm: float, prior: float) -> float:
    """KL(N(m, S) || N(0, prior I)) in nats, for a squared norm of m in units of the prior."""
    p = len(weights.at)
    squares = (norm + weights.trace) / prior
    return 0.5 * (squares + p * (math.log(prior) - 1.0) - weights.log_det)


def next_prior(weights: Weights, norm: float, prior: float, fast: bool) -> float:
    """tau² = (norm + tr S) / P, or in MacKay's form norm / (P - tr S / tau²)."""
    p = len(weights.at)
    if not fast:
        return (norm + weights.trace) / p
    return norm / max(p - weights.trace / prior, 1e-9 * p)
