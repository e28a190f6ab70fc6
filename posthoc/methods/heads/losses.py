"""The penalised log loss of many heads at once, and its gradient, in one pass over the rows.

A member is a head beside the frozen one: its logits are z + phi~ X with X (D+1)×C and phi~ the
features and a 1. What is minimised is its loss summed over rows, in nats, plus half the prior
precision times |X|². The logits of all members on a block are one product of matrices, and so is
the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64, I64, Array
from posthoc.methods.heads.blocks import Block, blocks
from posthoc.methods.heads.lbfgs import dot
from posthoc.rows import Rows

WORK = 8_000_000  # logits N×S×C at a time, of which a loss may hold four arrays

# (block, logits N×S×C, members S) -> (loss S, its derivative by the logits N×S×C). The logits may
# be overwritten.
Loss = Callable[[Block, Array, I64], tuple[F64, Array]]


@dataclass(frozen=True, slots=True)
class Penalised:
    """The objective of members ``first``, ``first`` + 1, …, at points S×P with P = (D+1)·C."""

    rows: Rows
    shape: tuple[int, int]  # (D+1, C)
    loss: Loss
    precision: float
    first: int

    def __call__(self, x: Array, problems: I64) -> tuple[F64, Array]:
        """Values S and gradients S×P of some problems at some points."""
        d, c = self.shape
        heads = x.reshape(len(x), d, c)
        value = 0.5 * self.precision * dot(x, x)
        gradient = heads * heads.dtype.type(self.precision)
        for block in blocks(self.rows, x.dtype):
            z = centred(block.z).astype(x.dtype)
            step = max(1, WORK // (len(block) * c))
            for i in range(0, len(x), step):
                part = slice(i, i + step)
                flat = heads[part].transpose(1, 0, 2).reshape(d, -1)
                logits = (block.phi @ flat).reshape(len(block), -1, c)
                logits += z[:, None]
                lost, slope = self.loss(block, logits, problems[part] + self.first)
                value[part] += lost
                back = block.phi.T @ slope.reshape(len(block), -1)
                gradient[part] += back.reshape(d, -1, c).transpose(1, 0, 2)
        return value, gradient.reshape(x.shape)


def centred(z: Array) -> F64:
    """Outputs less the largest of their row, which float32 then rounds least."""
    wide = np.asarray(z, np.float64)
    return np.asarray(wide - wide.max(1, keepdims=True))


def normalise(logits: Array) -> tuple[Array, Array]:
    """Turns logits …×C into probabilities where they lie; gives the peak and the log of the sum of
    exp(logit - peak), whose sum is the log normaliser. They come apart because the small loss of a
    sure row is lost beside its large peak."""
    peak = logits.max(-1)
    logits -= peak[..., None]
    np.exp(logits, out=logits)
    total = logits.sum(-1)
    logits /= total[..., None]
    return peak, np.log(total)


def log_loss(logits: Array, y: Array, weight: Array) -> tuple[F64, Array]:
    """Log loss of classes y N under weights N×S: the sum over rows S, and the derivative by the
    logits N×S×C, written where they were."""
    row = np.arange(len(y))
    own = logits[row, :, y]
    peak, total = normalise(logits)
    lost = (weight * (total + (peak - own))).sum(0, dtype=np.float64)
    logits *= weight[:, :, None]
    logits[row, :, y] -= weight
    return lost, logits
