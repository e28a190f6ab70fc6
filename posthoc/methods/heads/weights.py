"""Dirichlet weights of rows: the Bayesian bootstrap, and NPTL's urn with a base measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posthoc.contract import F64
from posthoc.methods.heads.blocks import sizes, stream

PILOT = -1  # the member whose weights are their means


@dataclass(frozen=True, slots=True)
class Weights:
    """(w, v) ~ (n + alpha) Dirichlet(1, …, 1, alpha/n, …, alpha/n) for each member: w the weights
    of n rows (mean 1), v those of the same rows with the base measure's labels (mean alpha/n).

    As gamma variables over their ``total``, one for each member. alpha = 0 is Rubin's Bayesian
    bootstrap (1981), for which v is not drawn.
    """

    seed: int
    n: int
    alpha: float
    total: F64

    def of(self, block: int, size: int, members: Sequence[int]) -> tuple[F64, F64]:
        """w and v of the rows of a block, each size×S."""
        w = np.ones((size, len(members)))
        v = np.full_like(w, self.alpha / self.n)
        for k, m in enumerate(members):
            if m != PILOT:
                w[:, k], v[:, k] = _gamma(self.seed, self.alpha / self.n, block, size, m)
                scale = (self.n + self.alpha) / self.total[m]
                w[:, k] *= scale
                v[:, k] *= scale
        return w, v


def dirichlet(seed: int, n: int, members: int, alpha: float = 0.0) -> Weights:
    """The weights of ``members`` over n rows; one pass over the random numbers for their totals."""
    total = np.zeros(members)
    for block, size in enumerate(sizes(n)):
        for m in range(members):
            w, v = _gamma(seed, alpha / n, block, size, m)
            total[m] += w.sum() + v.sum()
    return Weights(seed, n, alpha, total)


def _gamma(seed: int, shape: float, block: int, size: int, member: int) -> tuple[F64, F64]:
    w = stream(seed, "rows", block, member).standard_exponential(size)
    if shape == 0.0:
        return w, np.zeros(size)
    return w, stream(seed, "base", block, member).standard_gamma(shape, size)
