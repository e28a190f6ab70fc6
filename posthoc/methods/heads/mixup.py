"""MixupMP, the martingale posterior of mixup, on cached features (Wu & Williamson 2024,
arXiv:2403.12729).

The unseen data that a martingale posterior imputes are mixed pairs of rows: each member minimises
the loss of the rows plus ``mixup_weight`` times that of pseudo-rows t x_i + (1-t) x_j with the
labels mixed alike, t ~ Beta(a, a), drawn once a member. Mixing happens in the features, of which
the logits are a linear function, so that a pseudo-row's logits are the mixed logits and cost no
product of matrices. The paper retrains the whole network.

Partners come from the same block of `posthoc.rows.BLOCK` rows. Memory as
`posthoc.methods.heads.bootstrap`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from posthoc.contract import F64, I64, Array, Info, LinearHead, Paper, State, Task
from posthoc.methods.heads.blocks import Block, stream
from posthoc.methods.heads.losses import Loss, log_loss, normalise
from posthoc.methods.heads.members import Refit, emit, fit_classes, spread
from posthoc.rows import Rows

__all__ = ["INFO", "Settings", "emit", "fit", "spread"]

INFO = Info(
    name="mixup",
    kind="module",
    tasks=("classification",),
    needs=frozenset({"features", "linear_head", "labels"}),
    summary="last layers refitted on the rows and on mixtures of pairs of them",
    paper=Paper(
        "Posterior Uncertainty Quantification in Neural Networks using Data Augmentation",
        2024,
        "https://arxiv.org/abs/2403.12729",
    ),
    preserves=False,
)


class Settings(Refit):
    """``mixup_alpha`` is the parameter of the Beta that mixes, ``mixup_weight`` what a mixed row
    counts beside a real one, ``mixup_share`` how many there are for each real row; ``members``
    heads are refitted; ``prior_precision`` of the distance from the frozen head, None for the one
    at which the Laplace evidence on the same rows is largest; ``iterations`` of the optimiser at
    most; ``seed`` of the pairs."""

    mixup_alpha: float = Field(default=1.0, gt=0)
    mixup_weight: float = Field(default=1.0, gt=0)
    mixup_share: float = Field(default=1.0, gt=0, le=100)


def fit(rows: Rows, head: LinearHead, task: Task, settings: Settings) -> State:
    """The members. FitError for more of them than the graph should hold."""
    mass = 1.0 + settings.mixup_share * settings.mixup_weight
    return fit_classes(INFO.name, rows, head, mixed(settings), mass, settings)


def mixed(settings: Settings) -> Loss:
    """The log loss of each member over the rows and over its own pseudo-rows."""

    def loss(block: Block, logits: Array, members: I64) -> tuple[F64, Array]:
        slope, lost = np.zeros_like(logits), np.zeros(len(members))
        for k, m in enumerate(members.tolist()):
            for i, j, share in pairs(settings, block.index, len(block), m):
                t = share.astype(logits.dtype)
                between = t * logits[i, k] + (1 - t) * logits[j, k]
                value, back = _mixed_loss(between, block.y[i], block.y[j], t)
                lost[k] += settings.mixup_weight * value
                back *= settings.mixup_weight
                slope[i, k] += t * back
                slope[j, k] += (1 - t) * back
        real, back = log_loss(logits, block.y, np.ones(logits.shape[:2], logits.dtype))
        return real + lost, np.add(back, slope, out=slope)

    return loss


def pairs(
    settings: Settings, block: int, size: int, member: int
) -> Iterator[tuple[I64, I64, Array]]:
    """Rows i, their partners j and shares t (M×1) of a member's pseudo-rows in a block, in rounds
    in which no row is i or j twice. The pilot has pairs of its own."""
    rng = stream(settings.seed, "pairs", block, member + 1)
    wanted = round(settings.mixup_share * size)
    for start in range(0, max(wanted, 1), size):
        some = max(1, min(size, wanted - start))
        i, j = rng.permutation(size)[:some], rng.permutation(size)[:some]
        yield i, j, rng.beta(settings.mixup_alpha, settings.mixup_alpha, (some, 1))


def _mixed_loss(logits: Array, a: Array, b: Array, t: Array) -> tuple[float, Array]:
    """The loss of classes a with share t and b with 1 - t, summed over rows M, and its derivative
    by the logits M×C, written where they were."""
    row, share = np.arange(len(a)), t[:, 0]
    own = share * logits[row, a] + (1 - share) * logits[row, b]
    peak, total = normalise(logits)
    logits[row, a] -= share
    logits[row, b] -= 1 - share
    return float((total + (peak - own)).sum(dtype=np.float64)), logits
