"""The energy of outputs, and what tells whether it says anything: shared by the scores of outputs.

energy = -logsumexp(z), Liu et al. 2020 (arXiv:2010.03759). Softmax and cross-entropy do not see a
number added to all logits of a row, but the energy and the largest logit do. Two kinds of outputs
have none that means something: logarithms of probabilities (the energy is 0), and the logits
(0, l) that stand for one sigmoid logit, where all that speaks for the first class would count as
strange. The first are refused by the energy, the second centred: (-l/2, l/2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, Features, FitError, LinearHead

if TYPE_CHECKING:
    from posthoc.graph import Fragment
# Probabilities in float16 sum to 1 within this.
NORMALISED = 1e-3


@dataclass(frozen=True, slots=True)
class Outputs:
    """What was seen of ``rows``: the largest |energy|, and whether the first of two logits was
    always 0."""

    rows: int = 0
    energy: float = 0.0
    one_sided: bool = True

    @property
    def normalised(self) -> bool:
        """Whether all rows are logarithms of probabilities."""
        return self.rows > 0 and self.energy <= NORMALISED

    @property
    def sigmoid(self) -> bool:
        """Whether all rows are (0, l), one sigmoid logit."""
        return self.rows > 0 and self.one_sided


def add(seen: Outputs, batch: Features, name: str) -> Outputs:
    """Add a batch. Raises FitError, which names the score, for outputs that are not finite."""
    if not np.isfinite(batch.z).all():
        raise FitError(f"{name} met outputs that are not finite")
    if not len(batch):
        return seen
    z = np.asarray(batch.z, np.float64)
    sided = z.shape[1] == 2 and not z[:, 0].any()
    largest = float(np.abs(energy(z)).max())
    return Outputs(
        seen.rows + len(batch), max(seen.energy, largest), seen.one_sided and bool(sided)
    )


def join(a: Outputs, b: Outputs) -> Outputs:
    """What was seen of the rows of both."""
    return Outputs(a.rows + b.rows, max(a.energy, b.energy), a.one_sided and b.one_sided)


def centred(z: Array) -> F64:
    """Outputs N×C less their mean."""
    z = np.asarray(z, np.float64)
    return np.asarray(z - z.mean(1, keepdims=True))


def emit_centred(g: Fragment, z: str) -> str:
    """The same as a graph fragment."""
    return g.op("Sub", z, g.reduce("ReduceMean", z, 1, keepdims=True))


def energy(z: Array) -> F64:
    """-logsumexp of outputs N×C, N numbers; no overflow."""
    z = np.asarray(z, np.float64)
    top = z.max(1, keepdims=True)
    return np.asarray(-(np.log(np.exp(z - top).sum(1)) + top[:, 0]))


def emit_energy(g: Fragment, z: str) -> str:
    """The same as a graph fragment; returns the name of a tensor of N."""
    top = g.reduce("ReduceMax", z, 1, keepdims=True)
    total = g.sum(g.op("Exp", g.op("Sub", z, top)), 1, keepdims=True)
    return g.op("Neg", g.op("Squeeze", g.op("Add", g.op("Log", total), top), g.const([1], "int64")))


def head_of(head: LinearHead | None, name: str) -> LinearHead:
    """The head that energies of features are taken of, centred where it is one sigmoid logit.

    Raises FitError, which names the score, for a model without a linear head.
    """
    if head is None:
        raise FitError(f"{name} needs a linear head and this model is a black box")
    weight, bias = np.asarray(head.weight, np.float64), np.asarray(head.bias, np.float64)
    if len(weight) == 2 and not weight[0].any() and bias[0] == 0:
        return LinearHead(weight - weight.mean(0), bias - bias.mean())
    return LinearHead(weight, bias)
