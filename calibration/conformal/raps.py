"""RAPS, regularised adaptive sets (Angelopoulos, Bates, Malik & Jordan 2021, arXiv:2009.14193).

A class's score is the probability of the classes above it and, times u, its own, and a penalty for
each rank beyond k_reg. Sets are larger where the model is unsure, and penalised in their tail.
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
PENALTIES = (0.001, 0.01, 0.1, 0.2, 0.5)
__all__ = ["PENALTIES", "RANDOMISES", "RANKS", "choose", "emit", "score"]


def choose(p: Array, y: Array, alpha: float) -> dict[str, Any]:
    """``k_reg`` and ``penalty`` from calibration rows (never from conformal ones).

    k_reg is the (1-alpha) quantile of the true label's rank; the penalty is the one with the
    smallest mean set on the same rows (appendix E).
    """
    p, y = np.asarray(p, np.float64), np.asarray(y)
    rank = (p > p[np.arange(len(p)), y][:, None]).sum(1) + 1
    k_reg = int(np.quantile(rank, 1 - alpha, method="higher"))

    def scores(penalty: float) -> F64:
        return score(p, {"k_reg": k_reg, "penalty": penalty})

    return {"k_reg": k_reg, "penalty": smallest(PENALTIES, scores, y, alpha)}


def score(p: Array, settings: Mapping[str, Any], u: Array | float = 1.0) -> F64:
    """Scores N×C, less one: ``-(tail below c) - (1-u) p_c + penalty max(0, rank_c - k_reg)``, ranks
    from 1; ``u`` a scalar or N in [0, 1], 1 being the deterministic score."""
    r = ranked(p, u)
    return r.scattered(-(r.below + (1.0 - r.u) * r.p) + _penalties(settings, len(r.ranks)))


def emit(
    g: Fragment, settings: Mapping[str, Any], p: str, top: str, classes: int, u: str | None
) -> str:
    """The same as a graph fragment; ``u`` N, or None for 1."""
    del top

    def make(r: RankedNames) -> str:
        value = g.op("Sub", g.const(_penalties(settings, classes)[None]), r.below)
        return value if r.less is None else g.op("Add", value, g.op("Mul", r.less, r.p))

    return emit_ranked(g, p, classes, u, make)


def _penalties(settings: Mapping[str, Any], classes: int) -> F64:
    ranks = np.arange(1, classes + 1)
    return np.asarray(settings["penalty"] * np.maximum(0, ranks - settings["k_reg"]), np.float64)
