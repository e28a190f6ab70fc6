"""Nonparametric transfer learning on the last layer (Lee et al. 2024, arXiv:2403.07282).

The data distribution is Dirichlet-process distributed around a base measure: the rows' own
features with the frozen head's soft labels, q = softmax(z), which the paper calls the linear
probe's. Each member minimises the sum over rows of w l(y) + v l(q) with
(w, v) ~ (n + alpha) Dirichlet(1, …, 1, alpha/n, …, alpha/n), plus the penalty towards the frozen
head. alpha -> 0 is the Bayesian bootstrap; as alpha grows the members gather at the frozen head,
where the gradient of every l(q) is zero.

Memory as `posthoc.methods.heads.bootstrap`.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from posthoc.contract import F64, I64, Array, Info, LinearHead, Paper, State, Task
from posthoc.links import softmax
from posthoc.methods.heads.blocks import Block
from posthoc.methods.heads.losses import Loss, normalise
from posthoc.methods.heads.members import Refit, emit, fit_classes, spread
from posthoc.methods.heads.weights import Weights, dirichlet
from posthoc.rows import Rows

__all__ = ["INFO", "Settings", "emit", "fit", "spread"]

INFO = Info(
    name="nptl",
    kind="module",
    tasks=("classification",),
    needs=frozenset({"features", "linear_head", "labels"}),
    summary="nonparametric posterior of the last layer around the frozen head's labels",
    paper=Paper(
        "Enhancing Transfer Learning with Flexible Nonparametric Posterior Sampling",
        2024,
        "https://arxiv.org/abs/2403.07282",
    ),
    preserves=False,
)


class Settings(Refit):
    """``alpha`` is how many rows the frozen head's labels count for; ``members`` heads are
    refitted; ``prior_precision`` of the distance from the frozen head, None for the one at which
    the Laplace evidence on the same rows is largest; ``iterations`` of the optimiser at most;
    ``seed`` of the weights."""

    alpha: float = Field(default=100.0, gt=0, le=1e9)


def fit(rows: Rows, head: LinearHead, task: Task, settings: Settings) -> State:
    """The members. FitError for more of them than the graph should hold."""
    weights = dirichlet(settings.seed, rows.n, settings.members, settings.alpha)
    mass = 1.0 + settings.alpha / rows.n
    return fit_classes(INFO.name, rows, head, weighted(weights), mass, settings)


def weighted(weights: Weights) -> Loss:
    """The loss of each member over labels and the frozen head's soft labels."""

    def loss(block: Block, logits: Array, members: I64) -> tuple[F64, Array]:
        w, v = weights.of(block.index, len(block), members.tolist())
        return _soft_loss(logits, block.y, softmax(block.z), w, v)

    return loss


def _soft_loss(logits: Array, y: Array, soft: F64, w: F64, v: F64) -> tuple[F64, Array]:
    """Sum over rows of w l(y) + v l(soft), S, and its derivative by the logits N×S×C."""
    row = np.arange(len(y))
    soft, w, v = (a.astype(logits.dtype) for a in (soft, w, v))
    own, mean = logits[row, :, y], np.einsum("nsc,nc->ns", logits, soft)
    peak, total = normalise(logits)
    lost = w * (total + (peak - own)) + v * (total + (peak - mean))
    logits *= (w + v)[:, :, None]
    logits -= v[:, :, None] * soft[:, None]
    logits[row, :, y] -= w
    return lost.sum(0, dtype=np.float64), logits
