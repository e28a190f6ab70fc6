"""Nonconformity scores of every class by name: a label is in the set when its score is at most the
threshold. Each page has a definition, the same as a graph fragment, and what calibration rows
choose."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.conformal import aps, lac, raps, saps, topk
from posthoc.contract import F64, Array, FitError

if TYPE_CHECKING:
    from posthoc.graph import Fragment

METHODS: Mapping[str, ModuleType] = {
    "lac": lac,
    "aps": aps,
    "raps": raps,
    "saps": saps,
    "topk": topk,
}


def page(method: str) -> ModuleType:
    """The page of a score; FitError for an unknown one."""
    if method not in METHODS:
        raise FitError(f"unknown conformal method {method!r}; there are {', '.join(METHODS)}")
    return METHODS[method]


def class_scores(method: str, settings: Mapping[str, Any], p: Array, u: Array | float = 1.0) -> F64:
    """Scores N×C of probabilities N×C; ``u`` is used where the method randomises."""
    found: F64 = page(method).score(p, settings, u)
    return found


def emit_class_scores(
    g: Fragment,
    method: str,
    settings: Mapping[str, Any],
    p: str,
    top: str,
    classes: int,
    u: str | None = None,
) -> str:
    """The same as a graph fragment; ``top`` is the argmax of ``p``, N, and ``u`` None for 1."""
    name: str = page(method).emit(g, settings, p, top, classes, u)
    return name


def choose(method: str, p: Array, y: Array, alpha: float) -> dict[str, Any]:
    """The settings of a method, from calibration rows (never from conformal ones)."""
    found: dict[str, Any] = page(method).choose(p, y, alpha)
    return found


def nearest(p: Array) -> F64:
    """How far each of N×C probabilities is from the next one of its row: where that is rounding,
    another precision may rank the two the other way round."""
    p = np.asarray(p, np.float64)
    order = np.argsort(-p, axis=1, kind="stable")
    ordered = np.take_along_axis(p, order, 1)
    gaps = np.full((len(p), p.shape[1] + 1), np.inf)
    gaps[:, 1:-1] = ordered[:, :-1] - ordered[:, 1:]
    out = np.empty_like(p)
    np.put_along_axis(out, order, np.minimum(gaps[:, :-1], gaps[:, 1:]), 1)
    return out
