"""The penalised log loss of many heads at once, and its gradient, in one pass over the rows.

A member is a head beside the frozen one: its logits are z + phi~ X for X (D+1)×C, and what is
minimised is the sum of its loss over rows, in nats, plus half the prior precision times |X|². The
logits of every member in a block are one product of matrices, and so is the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, I64, Array
from posthoc.methods.heads.blocks import Block, blocks
from posthoc.rows import Rows

WORK = 8_000_000  # logits N×S×C that one step holds, a few times over

# (block, logits N×S×C, members S) -> (loss S, its derivative by the logits N×S×C); the logits may
# be overwritten.
Loss = Callable[[Block, Array, I64], tuple[F64, Array]]


@dataclass(frozen=True, slots=True)
class Penalised:
    """The objective of S members: points S×P, P = (D+1)·C, to values S and gradients S×P."""

    rows: Rows
    shape: tuple[int, int]  # (D+1, C)
    loss: Loss
    precision: float
    first: int = 0  # the member that problem 0 is

    def __call__(self, x: Array, problems: I64) -> tuple[F64, Array]:
        """Values in float64 and gradients of some problems at some points."""
        d, c = self.shape
        heads = x.reshape(len(x), d, c)
        value = 0.5 * self.precision * np.einsum("sp,sp->s", x, x, dtype=np.float64)
        gradient = heads * heads.dtype.type(self.precision)
        for block in blocks(self.rows, x.dtype):
            step = max(1, WORK // (len(block) * c))
            for i in range(0, len(x), step):
                part = slice(i, i + step)
                flat = heads[part].transpose(1, 0, 2).reshape(d, -1)
                logits = (block.phi @ flat).reshape(len(block), -1, c)
                logits += block.z[:, None]
                lost, slope = self.loss(block, logits, problems[part] + self.first)
                value[part] += lost
                back = block.phi.T @ slope.reshape(len(block), -1)
                gradient[part] += back.reshape(d, -1, c).transpose(1, 0, 2)
        return value, gradient.reshape(len(x), -1)


def normalise(logits: Array) -> tuple[Array, Array]:
    """Turns logits N×S×C into probabilities where they lie; gives (peak, log of the sum over
    classes of exp(logit - peak)), each N×S, whose sum is the log normaliser. They are kept apart
    because a sure row's loss is lost when its large peak is added first."""
    peak = logits.max(2)
    logits -= peak[:, :, None]
    np.exp(logits, out=logits)
    total = logits.sum(2)
    logits /= total[:, :, None]
    return peak, np.log(total)


def log_loss(logits: Array, y: Array, weight: Array) -> tuple[F64, Array]:
    """Log loss of classes y N with weights N×S: (sum over rows S, derivative by the logits N×S×C,
    written where the logits were)."""
    row = np.arange(len(y))
    own = logits[row, :, y]
    peak, total = normalise(logits)
    lost = (weight * (total + (peak - own))).sum(0, dtype=np.float64)
    logits *= weight[:, :, None]
    logits[row, :, y] -= weight
    return lost, logits
