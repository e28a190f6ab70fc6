"""Features in the coordinates of a fit: centred, in units of their standard deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array
from posthoc.rows import Rows

if TYPE_CHECKING:
    from posthoc.graph import Fragment

CONSTANT = 1e-5  # of its mean: a feature that varies less is a constant to float32


@dataclass(frozen=True, slots=True)
class Affine:
    """``x = (phi - centre) * inverse``, each D, in numbers that float32 holds exactly: a graph
    then subtracts what the definition subtracts, however far the features lie from zero."""

    centre: F64
    inverse: F64

    def __call__(self, phi: Array) -> F64:
        """Rows N×D."""
        return np.asarray((np.asarray(phi, np.float64) - self.centre) * self.inverse)

    def emit(self, g: Fragment, phi: str) -> str:
        """The same as a graph fragment."""
        centred = g.op("Sub", phi, g.const(self.centre))
        return g.op("Mul", centred, g.const(self.inverse))

    def tensors(self) -> dict[str, Array]:
        """For a state; `affine_of` reads them."""
        return {"centre": self.centre, "inverse": self.inverse}


def affine_of(tensors: dict[str, Array]) -> Affine:
    """The map that a state holds."""
    return Affine(np.asarray(tensors["centre"]), np.asarray(tensors["inverse"]))


def standard(mean: F64, variance: F64) -> Affine:
    """The map to mean 0 and variance 1, for means and variances D. A feature that is constant is
    only centred, on the scale of the median feature: its weight then stays what the prior says."""
    varies = variance > (CONSTANT * mean) ** 2
    scale = np.sqrt(np.where(varies, variance, 1.0))
    scale[~varies] = np.median(scale[varies]) if varies.any() else 1.0
    return Affine(_float32(mean), _float32(1.0 / scale))


def measure(rows: Rows) -> Affine:
    """`standard` of the features of all rows: one pass, blocks merged as in Chan, Golub & LeVeque
    1983, so that no sum of squares is subtracted from another."""
    n, mean, squares = 0, np.zeros(1), np.zeros(1)
    for block in rows:
        if len(block) == 0:
            continue
        phi = np.asarray(block.phi, np.float64)
        m = len(phi)
        centre = phi.mean(0)
        gap = centre - mean
        squares = squares + ((phi - centre) ** 2).sum(0) + gap**2 * (n * m / (n + m))
        mean = mean + gap * (m / (n + m))
        n += m
    return standard(mean, squares / n)


def with_one(x: F64) -> F64:
    """Rows N×(D+1) with the constant feature of the bias last."""
    return np.concatenate([x, np.ones((len(x), 1))], 1)


def _float32(values: F64) -> F64:
    return values.astype(np.float32).astype(np.float64)
