"""Variational Bayesian last layer, generative: ``vbll_generative``.

Harrison, Willes & Snoek 2024, arXiv:2404.11599, section 3.3: phi | c ~ N(mu_c, Sigma) with a
diagonal Sigma, q(mu_c) = N(m_c, S_c) with a diagonal S_c, prior N(0, tau²) about the mean of all
rows. The score of a class has a closed form, log N(phi; m_c, S_c + Sigma) + log pi_c, and softmax
of the scores is the module's own prediction; the frozen head is no limit of it. The paper's bound
of the sum of log p(c | phi) climbs by Adam over mini-batches,

    E_q[log N(phi; mu_y, Sigma)] + log pi_y - logsumexp_c score_c, minus KL(q || prior),

and tau² has the closed form of `discriminative`. Coordinates are those in which the pooled
within-class variance is 1 (diagonal) or the pooled within-class covariance is the identity (dense).

Served are the shift, score - z centred over classes, and Gaussian fluctuations, independent over
classes, with the exact variance of log N(phi; mu_c, Sigma) under q, sum_j e_j² S_cj / Sigma_j² +
S_cj² / (2 Sigma_j²) with e = phi - m_c: it grows with the distance from a class. The rows say
nothing about a class that they do not hold: its odds against all the others stay the frozen
model's, without fluctuation.

Memory of a fit: about 16 C D numbers (256 MiB at 1,000 classes and 2,048 features), and 4 D² more
where the covariance is dense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc.contract import F64, I64, Array, FitError, Info, LinearHead, State, Task
from posthoc.folds import log_softmax
from posthoc.links import Spread, SpreadNames, per_difference
from posthoc.methods.vbll.classes import Classes, bound, gradients, score_variance, scores
from posthoc.methods.vbll.covariance import check_dense
from posthoc.methods.vbll.layer import PAPER
from posthoc.methods.vbll.training import (
    Adam,
    Objective,
    batches,
    emphasis,
    epochs_for,
    learned_prior,
    steps,
)
from posthoc.methods.vbll.within import Within, measure_classes, within_of
from posthoc.rows import Rows

if TYPE_CHECKING:
    from posthoc.graph import Fragment

INFO = Info(
    name="vbll_generative",
    kind="module",
    tasks=("classification",),
    needs=frozenset({"features", "linear_head", "labels"}),
    summary="variational Bayesian last layer, generative: Gaussian classes, aware of distance",
    paper=PAPER,
    preserves=False,
)
LEAST_PRIOR = 1e-4  # where a fit starts, if all class means are equal
VARIANCE_RATE = 5.0  # learning rate of the logarithms of variances, in those of the means
STARTS = np.logspace(0, 3, 16)  # common factors of all variances to start from


class Settings(BaseModel):
    """``covariance`` within classes: dense (one for all classes, shrunk) or diagonal.
    ``prior_scale`` is the prior variance of a class mean about the mean of all rows, in
    within-class variances; None learns it in closed form. ``objective`` elbo, or de_elbo, which
    counts the data weights / rows times where there are more weights than rows. ``epochs``, by
    default as many as make 600 steps of Adam and at least 10; ``learning_rate`` at the start;
    ``batch_size``; ``seed`` of the order of rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    covariance: Literal["diagonal", "dense"] = "dense"
    prior_scale: float | None = Field(default=None, gt=0)
    objective: Objective = "elbo"
    epochs: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=0.01, gt=0, le=1)
    batch_size: int = Field(default=128, ge=1)
    seed: int = Field(default=0, ge=0)


def fit(rows: Rows, head: LinearHead, task: Task, settings: Settings) -> State:
    """The posterior of the class means.

    Raises FitError for rows of fewer than two classes, or too many features for covariance=dense.
    """
    width, features = head.weight.shape
    dense = settings.covariance == "dense"
    if dense:
        check_dense(1, features, INFO.name)
    within, counts, means = measure_classes(rows, width, dense)
    present = np.flatnonzero(counts)
    if len(present) < 2:
        raise FitError(f"{INFO.name} needs rows of at least two classes; there is one")
    place = np.full(width, -1)
    place[present] = np.arange(len(present))
    q = start(rows, within, counts[present], means[present], place, settings)
    epochs = settings.epochs or epochs_for(rows.n, settings.batch_size)
    train(q, rows, within, place, settings, epochs)
    tensors: dict[str, Array] = {
        **within.tensors(),
        "mean": q.mean,
        "variance": q.variance,
        "noise": q.noise,
        "log_prior": q.log_prior,
        "present": present,
    }
    total = sum(bound(q, within(b.phi), place[np.asarray(b.y)]) for b in rows if b.phi is not None)
    total -= q.divergence() / q.emphasis
    said = {
        "covariance": settings.covariance,
        "objective": settings.objective,
        "emphasis": q.emphasis,
        "prior_scale": q.prior,
        "epochs": epochs,
        "elbo": total / rows.n,
        "rows": rows.n,
        "classes": width,
        "classes_without_rows": width - len(present),
    }
    return State(tensors, said)


def start(
    rows: Rows, within: Within, counts: I64, means: F64, place: I64, settings: Settings
) -> Classes:
    """The conjugate posterior of the class means for unit noise, all variances times the common
    factor under which the first block of rows is likeliest: features are not independent, and
    scores that take them so are far too sure."""
    k, d = means.shape
    prior = settings.prior_scale or max(float((means**2).mean()), LEAST_PRIOR)
    variance = 1.0 / (counts[:, None] + 1.0 / prior) * np.ones((1, d))
    mean = variance * counts[:, None] * means
    log_prior = np.log(counts / counts.sum())
    block = next(b for b in rows if len(b))
    u, y = within(np.asarray(block.phi)), place[np.asarray(block.y)]

    def likelihood(factor: float) -> float:
        s = scores(mean, factor * variance, factor * np.ones(d), log_prior, u)
        return float(log_softmax(s)[np.arange(len(y)), y].mean())

    factor = float(max(STARTS, key=likelihood))
    kappa = emphasis(settings.objective, k * d, rows.n)
    log_noise = np.full(d, np.log(factor))
    return Classes(mean, np.log(factor * variance), log_noise, log_prior, prior, kappa)


def train(
    q: Classes, rows: Rows, within: Within, place: I64, settings: Settings, epochs: int
) -> None:
    """Climb the bound, in place."""
    rng = np.random.default_rng(settings.seed)
    total = epochs * steps(rows.n, settings.batch_size)
    rate = settings.learning_rate
    rates = [rate, VARIANCE_RATE * rate, VARIANCE_RATE * rate]
    adam = Adam([q.mean, q.log_variance, q.log_noise], rates, total)
    for epoch in range(epochs):
        for batch in batches(rows, rng, settings.batch_size):
            u, y = within(np.asarray(batch.phi)), place[np.asarray(batch.y)]
            adam.step(list(gradients(q, u, y, len(batch) / rows.n)))
        if settings.prior_scale is None and epoch > 0:
            q.prior = learned_prior(q.prior, q.mean, float(q.variance.sum()), 1.0)


def spread(state: State, phi: Array, z: Array) -> Spread:
    """The deviation of N rows (float64 definition)."""
    t, z = state.tensors, np.asarray(z, np.float64)
    u = within_of(t)(phi)
    own = scores(t["mean"], t["variance"], t["noise"], t["log_prior"], u)
    theirs = z[:, t["present"]]
    shift = np.tile((_total(own) - _total(theirs))[:, None], (1, z.shape[1]))
    shift[:, t["present"]] = own - theirs
    shift -= shift.mean(1, keepdims=True)
    variance = score_variance(t["mean"], t["variance"], t["noise"], u)
    among, directions = _directions(t["present"], z.shape[1])
    return Spread(variance @ among, np.sqrt(variance), directions, shift=shift)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment. Scores lose what all classes share before anything is rounded,
    which softmax does not see and float32 would."""
    t, width = state.tensors, int(state.settings["classes"])
    mean, variance, noise, present = t["mean"], t["variance"], t["noise"], t["present"]
    u = within_of(t).emit(g, phi)
    squares = g.op("Mul", u, u)
    inverse = 1.0 / (variance + noise)
    constant = t["log_prior"] - 0.5 * (mean**2 * inverse - np.log(inverse)).sum(1)
    parts = (_centred(-0.5 * inverse), _centred(mean * inverse), _centred(constant))
    own = _quadratic(g, squares, u, *parts)
    gain = variance / noise**2
    constant = (mean**2 * gain + 0.5 * (variance / noise) ** 2).sum(1)
    moved = g.op("Max", _quadratic(g, squares, u, gain, -2.0 * mean * gain, constant), g.const(0.0))
    theirs = z
    if len(present) < width:
        # Classes without rows move with the total of the others.
        theirs = g.op("Gather", z, g.const(present, "int64"), axis=1)
        place = np.full(width, len(present))
        place[present] = np.arange(len(present))
        index = g.const(place, "int64")
        own, theirs = (
            g.op("Gather", g.op("Concat", x, _emit_total(g, x), axis=1), index, axis=1)
            for x in (own, theirs)
        )
    shift = g.op("Sub", own, theirs)
    shift = g.op("Sub", shift, g.reduce("ReduceMean", shift, 1, keepdims=True))
    among, directions = _directions(present, width)
    rows = g.op("MatMul", moved, g.const(among[:, None]))
    return SpreadNames(rows, g.op("Sqrt", moved), directions, shift=shift)


def _directions(present: Array, width: int) -> tuple[F64, F64]:
    """(weights K of the variance of a difference among the classes with rows, directions K×C)."""
    k = len(present)
    among = per_difference(np.eye(k) - 1.0 / k)
    return among, np.eye(width)[present] - 1.0 / width


def _centred(values: F64) -> F64:
    return np.asarray(values - values.mean(0))


def _total(x: F64) -> F64:
    return np.asarray(x[:, 0] - log_softmax(x)[:, 0])


def _quadratic(g: Fragment, squares: str, u: str, second: F64, first: F64, constant: F64) -> str:
    """squares @ second' + u @ first' + constant."""
    linear = g.op("Gemm", u, g.const(first.T), g.const(constant))
    return g.op("Add", g.op("MatMul", squares, g.const(second.T)), linear)


def _emit_total(g: Fragment, x: str) -> str:
    """logsumexp over classes, N×1."""
    peak = g.reduce("ReduceMax", x, 1, keepdims=True)
    exps = g.op("Exp", g.op("Sub", x, peak))
    return g.op("Add", g.op("Log", g.sum(exps, 1, keepdims=True)), peak)
