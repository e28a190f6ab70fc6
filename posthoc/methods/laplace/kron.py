"""Last-layer Laplace with Kronecker curvature, in closed form from cached features.

For a head f = W phi + b and softmax likelihood, the curvature is approximated by U ⊗ A with U the
mean over rows of diag(p) - p p' (or of the outer products of gradients) and A = sum of phi phi'
(Ritter et al. 2018; Daxberger et al. 2021, arXiv:2106.14806). With eigenvalues lambda of U and mu
of A, the logit covariance of a row is Q_U diag(g) Q_U' where g_j = sum_k (Q_A' phi)_k² /
(lambda_j mu_k + d) and d is the prior precision: no Jacobian, no Cholesky factor, D² + DC + C²
multiplications a row. For regression the curvature is exact: A / sigma_k² for each output k.

Memory of a fit is some 6 D² + 5 C² float64 numbers and a block of 4,096 rows, whatever the number
of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, Info, LinearHead, Paper, State, Task
from posthoc.links import Spread, SpreadNames, per_difference
from posthoc.methods.laplace import joint as joint_of
from posthoc.methods.laplace import noise, sums
from posthoc.methods.laplace.criteria import choose_classification, finished
from posthoc.methods.laplace.prior import Spectrum
from posthoc.methods.laplace.settings import Curvature as Settings

if TYPE_CHECKING:
    from posthoc.graph import Fragment

INFO = Info(
    name="laplace",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "linear_head"}),
    summary="last-layer Laplace, Kronecker-factored curvature, closed form",
    paper=Paper(
        "Laplace Redux: Effortless Bayesian Deep Learning", 2021, "https://arxiv.org/abs/2106.14806"
    ),
)


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over ``n`` rows: ``gram`` K×K of phi~ phi~' (phi with a 1 appended), ``curvature`` C×C
    of diag(p) - p p' or of gradients, ``errors`` of a regression."""

    task: Task
    empirical: bool
    n: int
    gram: F64
    curvature: F64
    errors: sums.Errors


def init(head: LinearHead, task: Task, settings: Settings) -> Stats:
    """The empty statistic; FitError for the empirical Fisher matrix of a regression."""
    settings.check(task)
    c, k = head.weight.shape[0], head.weight.shape[1] + 1
    empty = sums.Errors(np.zeros(c), 0)
    curvature = np.zeros((c, c) if task == "classification" else (0, 0))
    return Stats(task, settings.fisher == "empirical", 0, np.zeros((k, k)), curvature, empty)


def update(stats: Stats, batch: Features) -> Stats:
    """Add the rows of a batch. Labels are used in a regression and for the empirical Fisher."""
    for block in sums.blocks(batch):
        gram = stats.gram + sums.gram(sums.real(block.phi))
        stats = replace(stats, n=stats.n + len(block), gram=gram)
        if stats.task == "regression":
            stats = replace(stats, errors=stats.errors.add(sums.errors(block)))
        elif stats.empirical:
            g = sums.gradients(block)
            stats = replace(stats, curvature=stats.curvature + g.T @ g)
        else:
            fresh = sums.softmax_curvature(sums.probabilities(block.z))
            stats = replace(stats, curvature=stats.curvature + fresh)
    return stats


def merge(a: Stats, b: Stats) -> Stats:
    """The statistic of both sets of rows."""
    return replace(
        a,
        n=a.n + b.n,
        gram=a.gram + b.gram,
        curvature=a.curvature + b.curvature,
        errors=a.errors.add(b.errors),
    )


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
    mu, basis = _features(stats, settings)

    def squares(phi: Array) -> F64:
        return np.asarray((np.asarray(phi, np.float64) @ basis[:-1] + basis[-1]) ** 2)

    if stats.task == "regression":
        directions = np.eye(len(head.bias))
        norm = sums.squared_norm(head, False)
        # The labelled rows are no training rows where the curvature comes from others.
        fresh = settings.scale(stats.n) != 1.0 or stats.errors.n < stats.n
        shrink, said = noise.posterior(settings, stats.errors, mu, norm, fresh, heldout, squares)
    else:
        lam, directions = _classes(stats, settings)
        known = Spectrum(np.multiply.outer(mu, lam), sums.squared_norm(head, settings.fold_bias))
        weights = per_difference(directions)

        def variance(fixed: F64, d: float) -> F64:
            return fixed @ ((1.0 / (known.values + d)) @ weights)

        precision, said = choose_classification(settings, known, heldout, squares, variance)
        shrink = 1.0 / (known.values + precision)
    centre = sums.centre(stats.gram[-1, :-1], stats.n)
    tensors: dict[str, Array] = {
        "centre": centre,
        "basis": basis[:-1],
        "offset": centre @ basis[:-1] + basis[-1],
        "shrink": shrink,
        "directions": directions,
    }
    return State(tensors, {"task": stats.task, **said, **settings.described(stats.n)})


def spectrum(stats: Stats, head: LinearHead, settings: Settings) -> Spectrum:
    """Of a classification: what `posthoc.methods.laplace.prior.log_evidence` takes."""
    values = np.multiply.outer(_features(stats, settings)[0], _classes(stats, settings)[0])
    return Spectrum(values, sums.squared_norm(head, settings.fold_bias))


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the posterior adds to the outputs of N rows (float64 definition)."""
    t = state.tensors
    g = _projected(state, phi) ** 2 @ t["shrink"]
    directions = np.asarray(t["directions"], np.float64)
    if state.settings["task"] == "regression":
        return Spread(g @ directions**2, np.sqrt(g), directions)
    return Spread(g @ per_difference(directions), np.sqrt(g), directions)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    t = state.tensors
    centred = g.op("Sub", phi, g.const(t["centre"]))
    projected = g.op("Gemm", centred, g.const(t["basis"]), g.const(t["offset"]))
    variance = g.op("MatMul", g.op("Mul", projected, projected), g.const(t["shrink"]))
    directions = np.asarray(t["directions"], np.float64)
    amplitude = g.op("Sqrt", variance)
    if state.settings["task"] == "regression":
        if not np.array_equal(directions, np.eye(len(directions))):  # an imported posterior's
            variance = g.op("MatMul", variance, g.const(directions**2))
        return SpreadNames(variance, amplitude, directions)
    mean = per_difference(directions)[:, None]
    return SpreadNames(g.op("MatMul", variance, g.const(mean)), amplitude, directions)


def joint(state: State, phi: Array) -> F64:
    """Covariance N×C×N×C of the outputs of N rows together."""
    t = state.tensors
    return joint_of.directions(_projected(state, phi), t["shrink"], t["directions"])


def _projected(state: State, phi: Array) -> F64:
    t = state.tensors
    return np.asarray((np.asarray(phi, np.float64) - t["centre"]) @ t["basis"] + t["offset"])


def _features(stats: Stats, settings: Settings) -> tuple[F64, F64]:
    """Eigenvalues K of the features' curvature, on the scale of the training rows, and vectors."""
    gram = stats.gram
    if not settings.fold_bias:  # a block of its own
        gram = gram.copy()
        gram[-1, :-1] = gram[:-1, -1] = 0.0
    mu, basis = np.linalg.eigh(gram)
    return np.maximum(mu, 0.0) * settings.scale(stats.n), basis


def _classes(stats: Stats, settings: Settings) -> tuple[F64, F64]:
    """Eigenvalues R of the mean curvature over classes and directions R×C. Softmax ignores a common
    shift of all logits and so does the curvature: folded, that direction is left out."""
    mean = stats.curvature / stats.n
    if settings.fold_bias:
        # Lifted above all others, it comes last and leaves the others orthogonal to it.
        mean = mean + (2.0 * np.trace(mean) or 1.0) / len(mean)
    lam, vectors = np.linalg.eigh(mean)
    keep = slice(None, -1 if settings.fold_bias else None)
    # Without any curvature what is left of the lift is rounding.
    lam = np.maximum(lam, 0.0) if np.trace(stats.curvature) > 0 else np.zeros(len(lam))
    return lam[keep], np.ascontiguousarray(vectors[:, keep].T)
