"""Variational Bayesian last layer: ``vbll``, discriminative or regression.

Both fit the deviation w from the frozen head, on standardised features x with a 1 for the bias:
outputs z + w'x, w_k ~ N(m_k, S_k), independent over outputs. What is served is the shift m'x and
fluctuations of variance x' S_k x. See `discriminative` and `regression`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc.contract import Array, Info, LinearHead, Paper, State, Task
from posthoc.links import Spread, SpreadNames, per_difference
from posthoc.methods.vbll import discriminative, regression, sums
from posthoc.methods.vbll.bound import Bound
from posthoc.methods.vbll.coordinates import affine_of, with_one
from posthoc.methods.vbll.covariance import Kind, emit_quadratic, quadratic
from posthoc.methods.vbll.training import Objective
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


class Settings(BaseModel):
    """Options of both tasks:

    ``covariance`` of each output's weights: diagonal, lowrank (diagonal plus ``rank`` directions)
    or dense; None is diagonal for a classifier and dense, which is exact, for a regression.
    ``prior_scale`` is the prior variance of an output's deviation at a typical row, in squared
    units of the output; None learns it in closed form, and towards 0 the frozen head is left.
    ``objective`` elbo, or de_elbo, which counts the data weights / rows times where there are more
    weights than rows; None is de_elbo for a classifier and elbo for a regression.

    A classifier's alone: ``bound`` of the expected log softmax, tilted (Knowles & Minka) or
    jensen (the paper's; it is far looser with many features); ``epochs``, by default as many as
    make 600 steps of Adam and at least 10; ``learning_rate`` at the start, for standardised
    features; ``batch_size``; ``seed`` of their order."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    covariance: Kind | None = None
    rank: int = Field(default=3, ge=1)
    prior_scale: float | None = Field(default=None, gt=0)
    objective: Objective | None = None
    bound: Bound = "tilted"
    epochs: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=0.01, gt=0, le=1)
    batch_size: int = Field(default=128, ge=1)
    seed: int = Field(default=0, ge=0)


def fit(rows: Rows, head: LinearHead, task: Task, settings: Settings) -> State:
    """The posterior. A regression takes one pass over the rows.

    Raises FitError where a dense covariance is too large, and for a regression whose outputs equal
    the labels.
    """
    if task == "classification":
        return discriminative.fit(rows, settings)
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
