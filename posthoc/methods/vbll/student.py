"""Variational Bayesian last layer with unknown noise: ``vbll_t``, Student-t predictions.

The regression of `regression` with a Gamma posterior for the precision of the noise:
q(w, l) = N(w | m, S / l) Gamma(l | a, b), prior N(w | 0, tau² / l) Gamma(l | a0, b0) (Harrison,
Willes & Snoek 2024, arXiv:2404.11599, and the t-regression of its package). For each output, with
error the squared error that m leaves:

    S = (gram + I / tau²)^-1 or its best diagonal or low-rank form, m that of ridge regression,
    a = a0 + n / 2,  b = b0 + (error + |m|² / tau²) / 2,

which is the best q, and exact for a dense S. An output is Student-t with 2a degrees of freedom,
mean z + m'x and squared scale (x'Sx + 1) b / a, of variance (x'Sx + 1) b / (a - 1). Memory: a few
P² numbers for P - 1 features.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import digamma, gammaln

from posthoc.contract import Array, Features, Info, LinearHead, State, Task
from posthoc.links import Spread, SpreadNames
from posthoc.methods.vbll import layer, sums
from posthoc.methods.vbll.ascent import Found, best_weights, climb, divergence, next_prior
from posthoc.methods.vbll.covariance import Kind, check_dense
from posthoc.methods.vbll.regression import tensors
from posthoc.methods.vbll.sums import Problem, Sums, problem
from posthoc.methods.vbll.training import Objective, emphasis

if TYPE_CHECKING:
    from posthoc.graph import Fragment

INFO = Info(
    name="vbll_t",
    kind="module",
    tasks=("regression",),
    needs=frozenset({"features", "linear_head", "labels"}),
    summary="variational Bayesian last layer with unknown noise: Student-t predictions",
    paper=layer.PAPER,
    preserves=False,
)
# a0, and b0 as a share of the mean squared residual: the weight of two rows, nearly no noise.
SHAPE, RATE = 1.0, 1e-2
PRIOR_SCALES = (1e-6, 1e6)


class Settings(BaseModel):
    """``covariance`` of each output's weights: dense (exact), diagonal, or lowrank (diagonal plus
    ``rank`` directions). ``prior_scale`` is the prior variance of an output's deviation at a
    typical row, in noise variances; None learns it in closed form, and towards 0 the frozen head
    is left. ``objective`` elbo, or de_elbo, which counts the data weights / rows times where there
    are more weights than rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    covariance: Kind = "dense"
    rank: int = Field(default=3, ge=1)
    prior_scale: float | None = Field(default=None, gt=0)
    objective: Objective = "elbo"


def init(head: LinearHead, task: Task, settings: Settings) -> Sums:
    """The empty statistic. FitError where P² numbers are too many."""
    outputs, features = head.weight.shape
    check_dense(1, features + 1, "vbll_t")
    return sums.empty(features, outputs)


def update(stats: Sums, batch: Features) -> Sums:
    """Add the rows of a batch."""
    return sums.add(stats, batch)


def merge(a: Sums, b: Sums) -> Sums:
    """The statistic of both sets of rows."""
    return sums.merge(a, b)


def finish(
    stats: Sums, head: LinearHead, settings: Settings, heldout: Features | None = None
) -> State:
    """The posterior; its covariances are stored in units of the target, times b / (a - 1).

    Raises FitError for no rows or residuals that are all zero.
    """
    p = len(stats.outer)
    kappa = emphasis(settings.objective, p, max(stats.n, 1))
    task = problem(stats, kappa, "vbll_t")
    found = [fit_output(task, k, settings) for k in range(len(task.squares))]
    shape = SHAPE + task.n / 2.0
    # Found.noise is b / a.
    noise = np.asarray([f.noise for f in found]) * shape / (shape - 1.0)
    said = {
        "task": "regression",
        "covariance": settings.covariance,
        "objective": settings.objective,
        "emphasis": kappa,
        "prior_scale": [f.prior * p for f in found],
        "noise_variance": [float(v) for v in noise],
        "df": 2.0 * shape,
        "elbo": sum(f.elbo for f in found) / task.n,
        "steps": max(f.steps for f in found),
        "rows": stats.n,
    }
    return State(tensors(task, found, noise), said)


def fit_output(task: Problem, output: int, settings: Settings) -> Found:
    """The posterior of one output: ``noise`` is b / a, ``prior`` tau² in noise variances."""
    p, n = len(task.values), task.n
    shape = SHAPE + n / 2.0
    rate = RATE * float(task.squares[output]) / n

    def evaluate(_: float, prior: float) -> Found:
        w = best_weights(task, output, 1.0, prior, settings.covariance, settings.rank)
        b = rate + 0.5 * (w.error + w.norm / prior)
        precision, log_precision = shape / b, float(digamma(shape)) - math.log(b)
        data = 0.5 * (n * (log_precision - math.log(2.0 * math.pi)) - precision * w.error - w.data)
        weights = divergence(w, precision * w.norm, prior)
        noise = _gamma_divergence(shape, b, SHAPE, rate)
        return Found(b / shape, prior, data - weights - noise, w)

    def update(here: Found, fast: bool) -> tuple[float, float]:
        if settings.prior_scale is not None:
            return here.noise, here.prior
        w = here.weights
        prior = next_prior(w, w.norm / here.noise, here.prior, fast)
        low, high = (s / p for s in PRIOR_SCALES)
        return here.noise, min(max(prior, low), high)

    start = 1.0 if settings.prior_scale is None else settings.prior_scale
    return climb(evaluate, update, 1.0, start / p)


def _gamma_divergence(a: float, b: float, a0: float, b0: float) -> float:
    """KL(Gamma(a, b) || Gamma(a0, b0)) in nats, b and b0 rates."""
    drift = (a - a0) * float(digamma(a)) - float(gammaln(a)) + float(gammaln(a0))
    return drift + a0 * math.log(b / b0) + a * (b0 - b) / b


def spread(state: State, phi: Array, z: Array) -> Spread:
    """The deviation of N rows, as variances."""
    return layer.spread(state, phi, z)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    return layer.emit(g, state, phi, z)
