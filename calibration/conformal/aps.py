"""APS, adaptive sets: RAPS without a penalty (Romano, Sesia & Candès 2020, arXiv:2006.02544).

The fairest to hard rows and the largest: the tail of small probabilities fills the sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from calibration.conformal import raps
from posthoc.contract import F64, Array

if TYPE_CHECKING:
    from posthoc.graph import Fragment

RANDOMISES = True
RANKS = True
_NONE = {"k_reg": 0, "penalty": 0.0}
__all__ = ["RANDOMISES", "RANKS", "choose", "emit", "score"]


def choose(p: Array, y: Array, alpha: float) -> dict[str, Any]:
    """There is nothing to choose."""
    del p, y, alpha
    return {}


def score(p: Array, settings: Mapping[str, Any], u: Array | float = 1.0) -> F64:
    """Scores N×C, less one: the probability above a class and u times its own."""
    del settings
    return raps.score(p, _NONE, u)


def emit(
    g: Fragment, settings: Mapping[str, Any], p: str, top: str, classes: int, u: str | None
) -> str:
    """The same as a graph fragment."""
    del settings
    return raps.emit(g, _NONE, p, top, classes, u)
