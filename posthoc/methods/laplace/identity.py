"""ICLA: last-layer Laplace with the identity for curvature.

The posterior covariance is I / d whatever the rows were, so that every logit has the variance
``(|phi|² + 1) / d``: a temperature that depends on the feature norm (Zhdanov, Dereka and
Kolesnikov 2025, arXiv:2312.10464). The paper takes d from the evidence of another curvature, since
with this one the evidence only falls as d rises; here d is the smallest precision within 0.0005
nats of the best negative log-likelihood, or the label-free rule. The posterior sees no row, so
every row is a held-out one. In a regression d is in units of each output's noise variance (variance
``sigma_k² (|phi|² + 1) / d``), since nothing else would set the scale of an output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from posthoc.contract import F64, Array, Features, Info, LinearHead, Paper, State, Task
from posthoc.links import Spread, SpreadNames
from posthoc.methods.laplace import joint as joint_of
from posthoc.methods.laplace import sums
from posthoc.methods.laplace.criteria import choose_classification, choose_regression, thinned
from posthoc.methods.laplace.noise import mean_square
from posthoc.methods.laplace.settings import Prior
from posthoc.rows import Rows

if TYPE_CHECKING:
    from posthoc.graph import Fragment

INFO = Info(
    name="icla",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "linear_head"}),
    summary="last-layer Laplace, identity curvature: a temperature by feature norm",
    paper=Paper(
        "Identity Curvature Laplace Approximation for Improved Out-of-Distribution Detection",
        2025,
        "https://arxiv.org/abs/2312.10464",
    ),
)


class Settings(Prior):
    """``prior_precision`` fixes the precision; else the rule ``prior`` finds it: heldout (the
    smallest precision within 0.0005 nats of the best negative log-likelihood of the probit
    predictive, each precision with its own temperature), or epsilon, which needs no labels: the
    smallest precision at which that predictive differs from the frozen model's by at most
    ``epsilon`` in mean total variation (uncalibrated)."""

    prior: Literal["heldout", "epsilon"] = "heldout"


def fit(rows: Rows, head: LinearHead, task: Task, settings: Settings) -> State:
    """The precision, and in a regression the noise of each output. Nothing else is learnt.

    Raises FitError for a rule or a regression without labels, and for a regression whose residuals
    are zero. Memory: the outputs of the rows that the rule looks at, at most a million numbers.
    """
    kept = None
    if settings.prior_precision is None:
        kept = thinned((Features(_squares(b.phi), b.z, b.y) for b in rows), rows.n)
    if task == "classification":
        precision, found = choose_classification(settings, None, kept, _same, _variance)
        scale = np.ones(1)
    else:
        noise = _noise(rows, len(head.bias))
        precision, found = choose_regression(
            settings, kept, _same, lambda d: noise, lambda a, d: noise * a / d
        )
        found["noise_variance"] = [float(v) for v in noise]
        scale = np.sqrt(noise)
    said = {"task": task, **found, "rows": rows.n, "width": len(head.bias)}
    return State({"scale": scale / np.sqrt(precision)}, said)


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the posterior adds to the outputs of N rows (float64 definition)."""
    a = _squares(phi)
    directions = _directions(state)
    if state.settings["task"] == "regression":
        return Spread(a * (directions**2).sum(0), np.sqrt(a), directions)
    return Spread(2.0 * a[:, 0] * state.tensors["scale"][0] ** 2, np.sqrt(a), directions)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    a = g.op("Add", g.sum(g.op("Mul", phi, phi), 1, keepdims=True), g.const(1.0))
    directions = _directions(state)
    scale = np.asarray(state.tensors["scale"], np.float64)
    factor = scale**2 if state.settings["task"] == "regression" else 2.0 * scale**2
    variance = g.op("Mul", a, g.const(factor[None]))
    return SpreadNames(variance, g.op("Sqrt", a), directions, equal=True)


def joint(state: State, phi: Array) -> F64:
    """Covariance N×C×N×C of the outputs of N rows together."""
    x = sums.exact(phi)
    directions = _directions(state)
    return joint_of.directions(x, np.ones((x.shape[1], len(directions))), directions)


def _directions(state: State) -> F64:
    """R×C for amplitudes ``sqrt(|phi|² + 1)``: centring over classes, or each output's scale."""
    c, scale = state.settings["width"], np.asarray(state.tensors["scale"], np.float64)
    if state.settings["task"] == "regression":
        return np.diag(scale)
    return np.asarray((np.eye(c) - 1 / c) * scale[0])


def _squares(phi: Array | None) -> F64:
    """``|phi|² + 1``, N×1."""
    phi = np.asarray(phi, np.float64)
    return np.asarray(np.einsum("nd,nd->n", phi, phi) + 1.0)[:, None]


def _same(squares: Array) -> F64:
    return np.asarray(squares, np.float64)


def _variance(squares: F64, precision: float) -> F64:
    return np.asarray(2.0 * squares[:, 0] / precision)


def _noise(rows: Rows, outputs: int) -> F64:
    total = sums.Errors(np.zeros(outputs), 0)
    for block in rows:
        total = total.add(sums.errors(block))
    return mean_square(total)
