"""A score's rank among clean rows, as a piecewise-linear function: scores of any scale as one.

The rank of a score is the share of clean rows below it, ties counting half, and straight between
at most KNOTS of their quantiles. Beyond the outermost it goes on by one rank a standard deviation,
so that rows far out are still told apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array

if TYPE_CHECKING:
    from posthoc.graph import Fragment

KNOTS = 256


@dataclass(frozen=True, slots=True)
class Ranks:
    """``knots`` K ascending, in numbers that float32 holds; ``ranks`` K their ranks in (0, 1),
    ascending; ``slope`` ranks a unit of the score, beyond the knots."""

    knots: F64
    ranks: F64
    slope: float

    def tensors(self) -> dict[str, Array]:
        """What a bundle keeps of it; the slope is one over the score's ``scale``."""
        return {"ranks/knots": self.knots, "ranks/ranks": self.ranks}

    def of(self, scores: Array) -> F64:
        """Ranks of N scores, outside 0..1 beyond the knots (float64 definition)."""
        x = np.asarray(scores, np.float64)
        start, base, slopes = self._pieces()
        piece = np.searchsorted(self.knots, x, side="left")
        return np.asarray(base[piece] + (x - start[piece]) * slopes[piece])

    def emit(self, g: Fragment, x: str) -> str:
        """The same as a graph fragment: of N to N."""
        from posthoc.graph import emit_count_below

        piece = g.cast(emit_count_below(g, self.knots, x), "int64")
        start, base, slopes = (g.op("Gather", g.const(t), piece, axis=0) for t in self._pieces())
        return g.op("Add", base, g.op("Mul", g.op("Sub", x, start), slopes))

    def _pieces(self) -> tuple[F64, F64, F64]:
        """Of the K + 1 pieces, below each knot and above the last: a knot at one end, its rank, and
        the slope."""
        inner = np.diff(self.ranks) / np.diff(self.knots)
        return (
            np.append(self.knots[0], self.knots),
            np.append(self.ranks[0], self.ranks),
            np.concatenate([[self.slope], inner, [self.slope]]),
        )


def fit_ranks(clean: Array, deviation: float, steepest: float) -> Ranks:
    """The ranks among ``clean`` scores n, whose standard deviation is ``deviation``.

    Where clean scores lie so close that a rank would take more than ``steepest`` ranks a unit, the
    next knot is further off: a graph in float32 does not know such scores apart.
    """
    s = np.sort(np.asarray(clean, np.float64))
    values = np.unique(s[np.linspace(0, len(s) - 1, KNOTS).round().astype(int)].astype(np.float32))
    knots = values.astype(np.float64)
    below, upto = (np.searchsorted(s.astype(np.float32), values, side=e) for e in ("left", "right"))
    ranks = (below + upto) / (2 * len(s))
    kept = [0]
    for i in range(1, len(knots)):
        if ranks[i] - ranks[kept[-1]] <= steepest * (knots[i] - knots[kept[-1]]):
            kept.append(i)
    return Ranks(knots[kept], ranks[kept], 1 / deviation)
