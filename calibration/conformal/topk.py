"""Top-k: the k most likely classes, k a conformal rank.

A score of whole numbers has ties, so that its sets cover more than they promise; with u they cover
what they promise. Every row has a set of the same size, or with u one of two sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.conformal.ranked import RankedNames, emit_ranked, ranked
from posthoc.contract import F64, Array

if TYPE_CHECKING:
    from posthoc.graph import Fragment

RANDOMISES = True
RANKS = True
__all__ = ["RANDOMISES", "RANKS", "choose", "emit", "score"]


def choose(p: Array, y: Array, alpha: float) -> dict[str, Any]:
    """There is nothing to choose."""
    del p, y, alpha
    return {}


def score(p: Array, settings: Mapping[str, Any], u: Array | float = 1.0) -> F64:
    """Ranks N×C from 1, less 1 - u."""
    del settings
    r = ranked(p, u)
    return r.scattered(r.ranks - (1.0 - r.u))


def emit(
    g: Fragment, settings: Mapping[str, Any], p: str, top: str, classes: int, u: str | None
) -> str:
    """The same as a graph fragment; ``u`` N, or None for 1."""
    del settings, top

    def make(r: RankedNames) -> str:
        ranks = g.const(np.arange(1, classes + 1)[None])
        return ranks if r.less is None else g.op("Add", ranks, r.less)

    return emit_ranked(g, p, classes, u, make)
