"""LAC, the least ambiguous set: one minus the probability (Sadinle, Lei & Wasserman 2019).

The smallest sets on the average, and the most empty ones; a class that the model thinks unlikely is
hardly ever in one. 1 - p of the top class is the sum of the others, so that rows which are nearly
sure keep their order in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc.contract import F64, Array

if TYPE_CHECKING:
    from posthoc.graph import Fragment

RANDOMISES = False
RANKS = False
__all__ = ["RANDOMISES", "RANKS", "choose", "emit", "score"]


def choose(p: Array, y: Array, alpha: float) -> dict[str, Any]:
    """There is nothing to choose."""
    del p, y, alpha
    return {}


def score(p: Array, settings: Mapping[str, Any], u: Array | float = 1.0) -> F64:
    """``1 - p_c`` for N×C probabilities; ``u`` is not used."""
    del settings, u
    p = np.asarray(p, np.float64)
    s: F64 = 1.0 - p
    rows, top = np.arange(len(p)), p.argmax(1)
    others = p.copy()
    others[rows, top] = 0.0
    s[rows, top] = others.sum(1)
    return s


def emit(
    g: Fragment, settings: Mapping[str, Any], p: str, top: str, classes: int, u: str | None
) -> str:
    """The same as a graph fragment; ``top`` is the argmax of ``p``, N."""
    del settings, u
    here = g.op("Equal", g.unsqueeze(top, 1), g.const(range(classes), "int64"))
    others = g.sum(g.op("Where", here, g.const(0.0), p), 1, keepdims=True)
    return g.op("Where", here, others, g.op("Sub", g.const(1.0), p))
