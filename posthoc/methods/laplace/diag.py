"""Last-layer Laplace with diagonal curvature: every weight has a variance of its own.

The curvature of weight (c, i) is the sum over rows of p_c (1 - p_c) phi_i² (Daxberger et al. 2021,
arXiv:2106.14806), or of (p_c - y_c)² phi_i² for the empirical Fisher matrix; the variance of logit
c is then ``sum_i phi_i² / (h_ci + d)``, one multiplication of phi² with a table D×C. Logits of
different classes are independent. In a regression output k has ``sum of phi_i² / sigma_k²``.

Memory of a fit is some 4 C D float64 numbers and a block of 4,096 rows, whatever the number of
rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, Info, LinearHead, Paper, State, Task
from posthoc.links import Spread, SpreadNames
from posthoc.methods.laplace import joint as joint_of
from posthoc.methods.laplace import noise, sums
from posthoc.methods.laplace.criteria import choose_classification, finished
from posthoc.methods.laplace.prior import Spectrum
from posthoc.methods.laplace.settings import Curvature as Settings

if TYPE_CHECKING:
    from posthoc.graph import Fragment

INFO = Info(
    name="laplace_diag",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "linear_head"}),
    summary="last-layer Laplace, diagonal curvature, closed form",
    paper=Paper(
        "Laplace Redux: Effortless Bayesian Deep Learning", 2021, "https://arxiv.org/abs/2106.14806"
    ),
)


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over ``n`` rows: ``curvature`` C×K (regression: 1×K, on the scale of unit noise) of the
    weights and, last, the bias; ``errors`` of a regression."""

    task: Task
    empirical: bool
    n: int
    curvature: F64
    errors: sums.Errors


def init(head: LinearHead, task: Task, settings: Settings) -> Stats:
    """The empty statistic; FitError for the empirical Fisher matrix of a regression."""
    settings.check(task)
    c, k = head.weight.shape[0], head.weight.shape[1] + 1
    curvature = np.zeros((c if task == "classification" else 1, k))
    empty = sums.Errors(np.zeros(c), 0)
    return Stats(task, settings.fisher == "empirical", 0, curvature, empty)


def update(stats: Stats, batch: Features) -> Stats:
    """Add the rows of a batch. Labels are used in a regression and for the empirical Fisher."""
    for block in sums.blocks(batch):
        if stats.task == "regression":
            weights = np.ones((len(block), 1), np.float32)
            stats = replace(stats, errors=stats.errors.add(sums.errors(block)))
        elif stats.empirical:
            weights = sums.gradients(block) ** 2
        else:
            weights = sums.bernoulli(block.z)
        squared = np.square(sums.real(block.phi))
        curvature = stats.curvature.copy()
        curvature[:, :-1] += weights.T @ squared
        curvature[:, -1] += weights.sum(0, dtype=np.float64)
        stats = replace(stats, n=stats.n + len(block), curvature=curvature)
    return stats


def merge(a: Stats, b: Stats) -> Stats:
    """The statistic of both sets of rows."""
    curvature = a.curvature + b.curvature
    return replace(a, n=a.n + b.n, curvature=curvature, errors=a.errors.add(b.errors))


def finish(
    stats: Stats, head: LinearHead, settings: Settings, heldout: Features | None = None
) -> State:
    """The posterior. Rows held out for the choice of the prior join it afterwards.

    Raises FitError where labels are absent that a setting or a regression needs, for a regression
    without residuals, and where the evidence has no maximum.
    """
    return finished(_posterior, update, stats, head, settings, heldout)


def _posterior(
    stats: Stats, head: LinearHead, settings: Settings, heldout: Features | None
) -> State:
    known = spectrum(stats, head, settings)
    if stats.task == "regression":
        # The labelled rows are no training rows where the curvature comes from others.
        fresh = settings.scale(stats.n) != 1.0 or stats.errors.n < stats.n
        mu, norm = known.values[:, 0], known.norm
        shrink, said = noise.posterior(settings, stats.errors, mu, norm, fresh, heldout, _squares)
    else:

        def variance(fixed: F64, d: float) -> F64:
            return np.asarray(fixed @ (2.0 * (1.0 / (known.values + d)).mean(1)))

        precision, said = choose_classification(settings, known, heldout, _squares, variance)
        shrink = 1.0 / (known.values + precision)
    tensors: dict[str, Array] = {"shrink": shrink[:-1], "offset": shrink[-1]}
    return State(tensors, {"task": stats.task, **said, **settings.described(stats.n)})


def spectrum(stats: Stats, head: LinearHead, settings: Settings) -> Spectrum:
    """What `posthoc.methods.laplace.prior.log_evidence` takes (K×C), for a classification."""
    centred = settings.fold_bias and stats.task == "classification"
    values = stats.curvature.T * settings.scale(stats.n)
    return Spectrum(values, sums.squared_norm(head, centred))


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the posterior adds to the outputs of N rows (float64 definition)."""
    v = np.asarray(phi, np.float64) ** 2 @ state.tensors["shrink"] + state.tensors["offset"]
    if state.settings["task"] == "regression":
        return Spread(v, np.sqrt(v), np.eye(v.shape[1]))
    c, total = v.shape[1], v.mean(1)
    alone = v * (1 - 2 / c) + total[:, None] / c if state.settings["fold_bias"] else v
    return Spread(2 * total, np.sqrt(v), _directions(state), class_variance=alone)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    t = state.tensors
    v = g.op("Gemm", g.op("Mul", phi, phi), g.const(t["shrink"]), g.const(t["offset"]))
    amplitude, directions = g.op("Sqrt", v), _directions(state)
    if state.settings["task"] == "regression":
        return SpreadNames(v, amplitude, directions)
    c, total = len(directions), g.reduce("ReduceMean", v, 1, keepdims=True)
    variance, alone = g.op("Mul", total, g.const(2.0)), v
    if state.settings["fold_bias"]:
        own = g.op("Mul", v, g.const(1 - 2 / c))
        alone = g.op("Add", own, g.op("Mul", total, g.const(1 / c)))
    return SpreadNames(variance, amplitude, directions, class_variance=alone)


def joint(state: State, phi: Array) -> F64:
    """Covariance N×C×N×C of the outputs of N rows together."""
    shrink = np.vstack([state.tensors["shrink"], state.tensors["offset"]])
    return joint_of.directions(sums.exact(phi), shrink, _directions(state))


def _directions(state: State) -> F64:
    c = state.tensors["shrink"].shape[1]
    centred = state.settings["task"] == "classification" and state.settings["fold_bias"]
    return np.asarray(np.eye(c) - centred / c)


def _squares(phi: Array) -> F64:
    return np.asarray(sums.exact(phi) ** 2)
