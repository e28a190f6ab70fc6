"""The regression: q(w_k) = N(m_k, S_k) for each output, with noise variances sigma_k².

Harrison, Willes & Snoek 2024, arXiv:2404.11599, on frozen features. The outputs are
z + w'x + noise with x the standardised features and a 1 for the bias, w ~ N(0, tau_k²) and the
precision of the noise under a Wishart prior, which for a diagonal noise is a Gamma for each output.
For each output k of its own, in nats:

    -n/2 log(2 pi sigma²) - (error + tr(S gram)) / (2 sigma²) - KL(q(w) || N(0, tau²))
    + dof log(1 / sigma²) - scale / (2 sigma²)

The package that accompanies the paper multiplies tr(S gram) by the sum of all precisions instead,
which is right for one output only. Nothing here needs a gradient: `ascent`. With a dense S it is
exact Bayesian linear regression, and the bound is the log evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from posthoc.contract import F64, Array, State
from posthoc.methods.vbll.ascent import Found, best_weights, climb, divergence, next_prior
from posthoc.methods.vbll.covariance import Kind, check_dense
from posthoc.methods.vbll.sums import Problem, Sums, problem
from posthoc.methods.vbll.training import Objective, emphasis

# The Wishart prior of the paper's package for one output: its exponent, and its scale, here as a
# share of the mean squared residual, so that it means the same in any unit.
DOF, SCALE = 1.5, 1e-2
# Prior variance of an output at a typical row, as a multiple of the mean squared residual.
PRIOR_SCALES = (1e-6, 1e6)


def fit_output(
    task: Problem, output: int, kind: Kind, rank: int, prior_scale: float | None
) -> Found:
    """The posterior of one output; ``prior_scale`` in squared units of the target, None learns."""
    p, n = len(task.values), task.n
    typical = float(task.squares[output]) / n
    scale = SCALE * typical

    def evaluate(noise: float, prior: float) -> Found:
        w = best_weights(task, output, noise, prior, kind, rank)
        data = -0.5 * n * math.log(2.0 * math.pi * noise) - (w.error + w.data) / (2.0 * noise)
        noise_prior = -DOF * math.log(noise) - scale / (2.0 * noise)
        return Found(noise, prior, data + noise_prior - divergence(w, w.norm, prior), w)

    def update(here: Found, fast: bool) -> tuple[float, float]:
        w = here.weights
        if fast:
            free = n + 2.0 * DOF - w.data / here.noise
            noise = (w.error + scale) / max(free, 1.0)
        else:
            noise = (w.error + w.data + scale) / (n + 2.0 * DOF)
        if prior_scale is not None:
            return noise, here.prior
        prior = next_prior(w, w.norm, here.prior, fast)
        low, high = (s * typical / p for s in PRIOR_SCALES)
        return noise, min(max(prior, low), high)

    start = typical if prior_scale is None else prior_scale
    return climb(evaluate, update, typical, start / p)


def fit(
    sums: Sums,
    *,
    covariance: Kind | None,
    rank: int,
    objective: Objective,
    prior_scale: float | None,
) -> State:
    """The posterior of every output. Memory: a few P² numbers for P - 1 features, K P² never.

    Raises FitError for no rows, residuals that are all zero, or too many features for a dense
    covariance.
    """
    kind: Kind = covariance or "dense"
    p = len(sums.outer)
    check_dense(1, p, "vbll")
    kappa = emphasis(objective, p, max(sums.n, 1))
    task = problem(sums, kappa, "vbll")
    outputs = range(len(task.squares))
    found = [fit_output(task, k, kind, rank, prior_scale) for k in outputs]
    said = {
        "task": "regression",
        "covariance": kind,
        "objective": objective,
        "emphasis": kappa,
        "prior_scale": [f.prior * p for f in found],
        "noise_variance": [f.noise for f in found],
        "elbo": sum(f.elbo for f in found) / task.n,
        "steps": max(f.steps for f in found),
        "rows": sums.n,
    }
    return State(tensors(task, found, np.ones(len(found))), said)


def tensors(task: Problem, found: Sequence[Found], factor: F64) -> dict[str, Array]:
    """What a state holds of posteriors whose covariances are to be multiplied by ``factor`` K."""
    weights = [f.weights for f in found]
    made: dict[str, Array] = {
        **task.affine.tensors(),
        "mean": np.stack([task.basis @ w.at for w in weights]),
    }
    if weights[0].spectrum is not None:
        made["basis"] = task.basis
        made["spectrum"] = np.stack([w.spectrum for w in weights if w.spectrum is not None], 1)
        made["spectrum"] = made["spectrum"] * factor
        return made
    variance = np.stack([w.variance for w in weights if w.variance is not None])
    made["variance"] = variance * factor[:, None]
    if weights[0].reduction is not None:
        low = np.stack([w.reduction for w in weights if w.reduction is not None])
        made["reduction"] = low * np.sqrt(factor)[:, None, None]
    return made
