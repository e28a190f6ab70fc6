"""SAPS, sorted adaptive sets (Huang, Xi, Zhang, Yao, Qiu & Wei 2024, arXiv:2310.06430).

Of the probabilities only the largest counts; every further rank costs the same ``weight``. Where
the tail of a softmax says little, sets are smaller than those of APS and still adapt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.conformal.ranked import RankedNames, emit_ranked, ranked, smallest
from posthoc.contract import F64, Array

if TYPE_CHECKING:
    from posthoc.graph import Fragment

RANDOMISES = True
RANKS = True
WEIGHTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
__all__ = ["RANDOMISES", "RANKS", "WEIGHTS", "choose", "emit", "score"]


def choose(p: Array, y: Array, alpha: float) -> dict[str, Any]:
    """The ``weight`` of a rank whose sets are smallest on calibration rows."""
    y = np.asarray(y)
    return {"weight": smallest(WEIGHTS, lambda w: score(p, {"weight": w}), y, alpha)}


def score(p: Array, settings: Mapping[str, Any], u: Array | float = 1.0) -> F64:
    """Scores N×C, less one: ``u p_max`` for the top class, ``p_max + weight (rank - 2 + u)`` for
    the others; ``u`` a scalar or N in [0, 1], 1 being the deterministic score."""
    r = ranked(p, u)
    head = -r.below[:, :1]  # p_max - 1
    others = head + settings["weight"] * (r.ranks - 2 + r.u)
    first = head - (1.0 - r.u) * r.p[:, :1]
    return r.scattered(np.where(r.ranks == 1, first, others))


def emit(
    g: Fragment, settings: Mapping[str, Any], p: str, top: str, classes: int, u: str | None
) -> str:
    """The same as a graph fragment; ``u`` N, or None for 1."""
    del top
    weight, ranks = float(settings["weight"]), np.arange(1, classes + 1)

    def make(r: RankedNames) -> str:
        one = g.const([1], "int64")
        tail = g.op("Slice", r.below, g.const([0], "int64"), one, one)
        value = g.op("Sub", g.const((weight * (ranks - 1.0))[None]), tail)
        if r.less is None:
            return value
        largest = g.op("Slice", r.p, g.const([0], "int64"), one, one)
        first = g.const((ranks == 1)[None], "bool")
        share = g.op("Where", first, largest, g.const(weight))
        return g.op("Add", value, g.op("Mul", r.less, share))

    return emit_ranked(g, p, classes, u, make)
