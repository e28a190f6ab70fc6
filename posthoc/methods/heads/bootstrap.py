"""The Bayesian bootstrap of the last layer: refits under Dirichlet weights.

Each member minimises the rows' loss under weights n·Dirichlet(1, …, 1) (Rubin 1981; Newton &
Raftery 1994), plus half the prior precision times the squared distance from the frozen head. For
a convex loss this draws exactly, as far as the optimiser converges, from the nonparametric
posterior of Fong, Lyddon & Holmes 2019 (arXiv:1902.03175). The penalty keeps weights finite
where the rows are separable or lack a class.

Memory of a fit is 28 times the members fitted at one time (three quarters of a GB, or one member),
some hundred MB of logits, (D+1)² and C² numbers, and all members in float32: at C = 1,000 and
D = 2,048 a peak of 0.8 GB and 8.2 MB a member. Of a regression see `posthoc.methods.heads.ridge`.
"""

from __future__ import annotations

from posthoc.contract import F64, I64, Array, Info, LinearHead, Paper, State, Task
from posthoc.methods.heads.blocks import Block
from posthoc.methods.heads.losses import Loss, log_loss
from posthoc.methods.heads.members import Refit, emit, fit_classes, spread
from posthoc.methods.heads.ridge import fit_values
from posthoc.methods.heads.weights import Weights, dirichlet
from posthoc.rows import Rows

__all__ = ["INFO", "Settings", "emit", "fit", "spread"]

INFO = Info(
    name="bootstrap",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "linear_head", "labels"}),
    summary="Bayesian bootstrap of the last layer: Dirichlet-weighted refits",
    paper=Paper(
        "Scalable Nonparametric Sampling from Multimodal Posteriors with the Posterior Bootstrap",
        2019,
        "https://arxiv.org/abs/1902.03175",
    ),
    preserves=False,
)


class Settings(Refit):
    """``members`` heads are refitted; ``prior_precision`` of the distance from the frozen head,
    None for the one at which the Laplace evidence on the same rows is largest; ``iterations`` of
    the optimiser at most (a regression is closed form); ``seed`` of the weights."""


def fit(rows: Rows, head: LinearHead, task: Task, settings: Settings) -> State:
    """The members. FitError for more of them than the graph should hold."""
    weights = dirichlet(settings.seed, rows.n, settings.members)
    if task == "regression":
        return fit_values(INFO.name, rows, head, weights, settings)
    return fit_classes(INFO.name, rows, head, weighted(weights), 1.0, settings)


def weighted(weights: Weights) -> Loss:
    """The log loss of each member under its own weights."""

    def loss(block: Block, logits: Array, members: I64) -> tuple[F64, Array]:
        w, _ = weights.of(block.index, len(block), members.tolist())
        return log_loss(logits, block.y, w.astype(logits.dtype))

    return loss
