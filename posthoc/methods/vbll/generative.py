"""Variational Bayesian last layer, generative: ``vbll_generative``.

Harrison, Willes & Snoek 2024, arXiv:2404.11599: phi | c ~ N(mu_c, Sigma),
q(mu_c) = N(m_c, S_c), prior N(0, tau²) about the mean of all rows. The score of a class has a
closed form, log N(phi; m_c, S_c + Sigma) + log pi_c; the frozen head is no limit of it.

Here q maximises the bound of the joint likelihood of features and labels, where it is exact and
has a closed form, as has tau²; Sigma is the pooled covariance within classes. (The paper's bound of
log p(c | phi) is far looser: climbed from here on magika's features, it took the accuracy from .98
to .82.) Real features are not Gaussian and these scores much too sure, so the module's logits
are score / f, with the temperature f at which the leave-one-out likelihood of the labels is
largest: it has a closed form too, and spends no rows.

Served are the shift, score / f - z centred over classes, and Gaussian fluctuations, independent
over classes, with the exact variance of log N(phi; mu_c, Sigma) / f under q: (e'Sigma^-1 S_c
Sigma^-1 e + tr((S_c Sigma^-1)²) / 2) / f² with e = phi - m_c. It grows with the distance from a
class. The rows say nothing about a class that they do not hold: its odds against all the others
stay the frozen model's, without fluctuation.

Memory of a fit: 4 C D numbers, and 4 D² where the covariance is dense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from posthoc.contract import F64, I64, Array, Features, FitError, Info, LinearHead, State, Task
from posthoc.folds import log_softmax
from posthoc.links import Spread, SpreadNames, per_difference
from posthoc.methods.vbll.classes import Classes, left_out_scores, posterior, scores
from posthoc.methods.vbll.covariance import check_dense
from posthoc.methods.vbll.layer import PAPER
from posthoc.methods.vbll.within import Measured, measure_classes, within_of
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
TEMPERATURES = np.logspace(-1, 4, 51)  # candidates for f


class Settings(BaseModel):
    """``covariance`` within classes, one for all of them: dense, shrunk towards the diagonal, or
    diagonal. ``prior_scale`` is the prior variance of a class mean about the mean of all rows, in
    pooled within-class variances; None learns it in closed form."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    covariance: Literal["diagonal", "dense"] = "dense"
    prior_scale: float | None = Field(default=None, gt=0)


def fit(rows: Rows, head: LinearHead, task: Task, settings: Settings) -> State:
    """The posterior of the class means: three passes.

    Raises FitError for rows of fewer than two classes, or too many features for covariance=dense.
    """
    width, d = head.weight.shape
    dense = settings.covariance == "dense"
    if dense:
        check_dense(1, d, INFO.name)
    measured = measure_classes(rows, width, dense)
    present = np.flatnonzero(measured.counts)
    if len(present) < 2:
        raise FitError(f"{INFO.name} needs rows of at least two classes; there is one")
    counts, means = measured.counts[present], measured.means[present]
    classes = posterior(counts, (means**2).sum(1), d, settings.prior_scale)
    losses = left_out_losses(rows, measured, present, classes)
    tensors: dict[str, Array] = {
        **measured.within.tensors(),
        "mean": classes.shrink[:, None] * means,
        "variance": classes.variance,
        "log_prior": classes.log_prior,
        "present": present,
    }
    said = {
        "covariance": settings.covariance,
        "shrinkage": 1.0 - measured.kept,
        "prior_scale": classes.prior,
        "temperature": float(TEMPERATURES[losses.argmin()]),
        "left_out_nll": float(losses.min()),
        "rows": rows.n,
        "classes": width,
        "classes_without_rows": width - len(present),
    }
    return State(tensors, said)


def left_out_losses(rows: Rows, measured: Measured, present: I64, classes: Classes) -> F64:
    """Mean negative log-likelihood of the labels in nats at each temperature, leave-one-out."""
    place = np.full(len(measured.counts), -1)
    place[present] = np.arange(len(present))
    total = np.zeros(len(TEMPERATURES))
    for block in rows:
        u, y = measured.within(_phi(block)), place[np.asarray(block.y, np.int64)]
        s = left_out_scores(u, y, measured.means[present], classes, measured.kept)
        own = np.arange(len(y))
        total -= [log_softmax(s / f)[own, y].sum() for f in TEMPERATURES]
    return total / rows.n


def spread(state: State, phi: Array, z: Array) -> Spread:
    """The deviation of N rows (float64 definition)."""
    t, z = state.tensors, np.asarray(z, np.float64)
    mean, f = t["mean"], float(state.settings["temperature"])
    u = within_of(t)(phi)
    squares = (u**2).sum(1)[:, None] - 2.0 * (u @ mean.T) + (mean**2).sum(1)
    own = scores(squares, t["variance"], t["log_prior"], mean.shape[1]) / f
    theirs = z[:, t["present"]]
    shift = np.tile((_total(own) - _total(theirs))[:, None], (1, z.shape[1]))
    shift[:, t["present"]] = own - theirs
    shift -= shift.mean(1, keepdims=True)
    steep = t["variance"] / f**2
    variance = steep * (np.maximum(squares, 0.0) + 0.5 * mean.shape[1] * t["variance"])
    among, directions = _directions(t["present"], z.shape[1])
    return Spread(variance @ among, np.sqrt(variance), directions, shift=shift)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment. Scores lose what all classes share before anything is rounded,
    which softmax does not see and float32 would."""
    t, width = state.tensors, int(state.settings["classes"])
    mean, variance, present = t["mean"], t["variance"], t["present"]
    f, d, norms = float(state.settings["temperature"]), mean.shape[1], (mean**2).sum(1)
    within = within_of(t)
    x = within.affine.emit(g, phi)
    square = within.emit_square(g, x)
    mean = within.turned(mean)  # its weights; norms and distances are those of u
    total = 1.0 + variance
    at_zero = scores(norms[None], variance, t["log_prior"], d)[0]
    parts = (-0.5 / total, mean / total[:, None], at_zero)
    own = _quadratic(g, square, x, *((p - p.mean(0)) / f for p in parts))
    steep = variance / f**2
    parts = (steep, -2.0 * steep[:, None] * mean, steep * (norms + 0.5 * d * variance))
    moved = g.op("Max", _quadratic(g, square, x, *parts), g.const(0.0))
    theirs = z
    if len(present) < width:
        # Classes without rows move with the total of the others.
        theirs = g.op("Gather", z, g.const(present, "int64"), axis=1)
        place = np.full(width, len(present))
        place[present] = np.arange(len(present))
        index = g.const(place, "int64")
        own, theirs = (
            g.op("Gather", g.op("Concat", part, _emit_total(g, part), axis=1), index, axis=1)
            for part in (own, theirs)
        )
    shift = g.op("Sub", own, theirs)
    shift = g.op("Sub", shift, g.reduce("ReduceMean", shift, 1, keepdims=True))
    among, directions = _directions(present, width)
    rows = g.op("MatMul", moved, g.const(among[:, None]))
    return SpreadNames(rows, g.op("Sqrt", moved), directions, shift=shift)


def _phi(block: Features) -> Array:
    assert block.phi is not None
    return block.phi


def _directions(present: Array, width: int) -> tuple[F64, F64]:
    """(weights K of the variance of a difference among the classes with rows, directions K×C)."""
    k = len(present)
    among = per_difference(np.eye(k) - 1.0 / k)
    return among, np.eye(width)[present] - 1.0 / width


def _total(x: F64) -> F64:
    """logsumexp over classes, N."""
    return np.asarray(x[:, 0] - log_softmax(x)[:, 0])


def _emit_total(g: Fragment, x: str) -> str:
    """The same, N×1."""
    peak = g.reduce("ReduceMax", x, 1, keepdims=True)
    exps = g.op("Exp", g.op("Sub", x, peak))
    return g.op("Add", g.op("Log", g.sum(exps, 1, keepdims=True)), peak)


def _quadratic(g: Fragment, square: str, x: str, second: F64, first: F64, constant: F64) -> str:
    """square second + x first' + constant, N×K."""
    linear = g.op("Gemm", x, g.const(first.T), g.const(constant))
    return g.op("Add", g.op("Mul", square, g.const(second[None])), linear)
