"""Variational Bayesian last layer: ``vbll``, discriminative or regression.

Both fit the deviation w from the frozen head, on standardised features x with a 1 for the bias:
outputs z + w'x, w_k ~ N(m_k, S_k), independent over outputs. What is served is the shift m'x and
fluctuations of variance x' S_k x. See `discriminative` and `regression`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import Array, FitError, Info, LinearHead, Paper, State, Task
from posthoc.links import Spread, SpreadNames, per_difference
from posthoc.methods.vbll import discriminative, regression, sums
from posthoc.methods.vbll.coordinates import affine_of, with_one
from posthoc.methods.vbll.covariance import emit_quadratic, quadratic
from posthoc.methods.vbll.settings import CLASSIFIER_ONLY, Settings
from posthoc.rows import Rows

if TYPE_CHECKING:
    from posthoc.graph import Fragment

PAPER = Paper("Variational Bayesian Last Layers", 2024, "https://arxiv.org/abs/2404.11599")
INFO = Info(
    name="vbll",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "linear_head", "labels"}),
    summary="variational Bayesian last layer around the frozen head, discriminative or regression",
    paper=PAPER,
    preserves=False,
)


def fit(rows: Rows, head: LinearHead, task: Task, settings: Settings) -> State:
    """The posterior. A regression takes one pass over the rows.

    Raises FitError where a dense covariance is too large, and for a regression whose outputs equal
    the labels or that is given a classifier's setting.
    """
    if task == "classification":
        return discriminative.fit(rows, settings)
    if alien := sorted(settings.model_fields_set & CLASSIFIER_ONLY):
        raise FitError(f"vbll, setting {alien[0]}: it is for classifiers; a regression is exact")
    outputs, features = head.weight.shape
    found = sums.empty(features, outputs)
    for block in rows:
        found = sums.add(found, block)
    return regression.fit(
        found,
        covariance=settings.covariance,
        rank=settings.rank,
        objective=settings.objective or "elbo",
        prior_scale=settings.prior_scale,
    )


def spread(state: State, phi: Array, z: Array) -> Spread:
    """The deviation of N rows (float64 definition)."""
    t = state.tensors
    x = with_one(affine_of(t)(phi))
    shift = x @ t["mean"].T
    variance = quadratic(t, x)
    own = np.eye(len(t["mean"]))
    if state.settings["task"] == "regression":
        return Spread(variance, np.sqrt(variance), own, shift=shift)
    directions = own - 1.0 / len(own)
    rows = variance @ per_difference(directions)
    return Spread(rows, np.sqrt(variance), directions, shift=shift)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    t = state.tensors
    x = affine_of(t).emit(g, phi)
    mean = t["mean"].T
    shift = g.op("Gemm", x, g.const(mean[:-1]), g.const(mean[-1]))
    variance = emit_quadratic(g, t, x)
    amplitude = g.op("Sqrt", variance)
    own = np.eye(len(t["mean"]))
    if state.settings["task"] == "regression":
        return SpreadNames(variance, amplitude, own, shift=shift)
    directions = own - 1.0 / len(own)
    rows = g.op("MatMul", variance, g.const(per_difference(directions)[:, None]))
    return SpreadNames(rows, amplitude, directions, shift=shift)
