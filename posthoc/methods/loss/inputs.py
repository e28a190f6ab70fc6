"""What a loss predictor sees of a row: features, if there are any, and a summary of the outputs.

Classification: the ``top`` largest logits less the largest, and last the log-odds of the predicted
class against the others of these. Regression: the means. Each input is standardised by the rows
that the network is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, Task

if TYPE_CHECKING:
    from posthoc.graph import Fragment

REACH = 10.0  # standard deviations that an input may count


@dataclass(frozen=True, slots=True)
class Inputs:
    """``mean`` J, which float32 holds exactly, and ``scale`` J, one over the standard deviation and
    0 for a constant input; ``features`` says whether features come first."""

    task: Task
    top: int
    features: bool
    mean: F64
    scale: F64

    def __call__(self, phi: Array | None, z: Array) -> tuple[F64, F64]:
        """(inputs N×J within `REACH`, the size N×1 of the largest before that)."""
        raw = _raw(self.task, self.top, phi if self.features else None, z)
        x = (raw - self.mean) * self.scale
        return np.clip(x, -REACH, REACH), np.abs(x).max(1, keepdims=True)

    def emit(self, g: Fragment, phi: str | None, z: str) -> tuple[str, str]:
        """The same as a graph fragment."""
        parts = [phi] if self.features and phi is not None else []
        parts += [z] if self.task == "regression" else _emit_summary(g, z, self.top)
        raw = g.op("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
        x = g.op("Mul", g.op("Sub", raw, g.const(self.mean)), g.const(self.scale))
        away = g.reduce("ReduceMax", g.op("Abs", x), 1, keepdims=True)
        return g.op("Clip", x, g.const(-REACH), g.const(REACH)), away


def measure(blocks: Iterable[Features], task: Task, top: int) -> Inputs:
    """The scales of the inputs over the rows, in one pass; FitError for features that are not
    finite."""
    n, mean, square, features, k = 0, np.zeros(1), np.zeros(1), False, top
    for block in blocks:
        if not len(block):
            continue
        features, k = block.phi is not None, min(top, block.z.shape[1])
        raw = _raw(task, k, block.phi, block.z)
        if not np.isfinite(raw).all():
            raise FitError("loss met features that are not finite")
        more, centre = len(raw), raw.mean(0)
        away = centre - mean
        square = square + ((raw - centre) ** 2).sum(0) + away**2 * (n * more / (n + more))
        mean, n = mean + away * (more / (n + more)), n + more
    sd = np.sqrt(square / n)
    constant = sd <= 1e-7 * np.abs(mean)  # what rounding in float32 leaves of one
    mean = mean.astype(np.float32).astype(np.float64)  # a graph subtracts what this subtracts
    return Inputs(task, k, features, mean, np.where(constant, 0.0, 1.0 / np.where(constant, 1, sd)))


def _raw(task: Task, top: int, phi: Array | None, z: Array) -> F64:
    z = np.asarray(z, np.float64)
    seen = [] if phi is None else [np.asarray(phi, np.float64)]
    if task == "regression":
        return np.concatenate([*seen, z], 1)
    largest = np.sort(np.partition(z, -top, axis=1)[:, -top:], axis=1)[:, ::-1]
    behind = largest[:, 1:] - largest[:, :1]
    second = behind[:, :1]
    odds = -(second + np.log(np.exp(behind - second).sum(1, keepdims=True)))
    return np.concatenate([*seen, behind, odds], 1)


def _emit_summary(g: Fragment, z: str, top: int) -> list[str]:
    values, _ = g.op2("TopK", z, g.const([top], "int64"), axis=1)
    first = g.op("Gather", values, g.const([0], "int64"), axis=1)
    others = g.op("Gather", values, g.const(range(1, top), "int64"), axis=1)
    behind = g.op("Sub", others, first)
    second = g.op("Gather", behind, g.const([0], "int64"), axis=1)
    rest = g.sum(g.op("Exp", g.op("Sub", behind, second)), 1, keepdims=True)
    return [behind, g.op("Neg", g.op("Add", second, g.op("Log", rest)))]
