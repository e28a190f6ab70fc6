"""Nonconformity scores of every class: LAC and RAPS, as a definition and as a graph fragment.

A label is in the set when its score is at most the threshold. Both are written so that saturated
rows keep their order in float32: 1 - p of the top class is the sum of the others, and the APS
family sums the tail below a class instead of one minus the head above it (the two differ by the
constant 1, which a rank does not see).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc.contract import F64, Array, FitError

if TYPE_CHECKING:
    from posthoc.graph import Fragment

METHODS = ("lac", "raps")


def lac(p: Array) -> F64:
    """``1 - p_c`` for N×C probabilities (Sadinle, Lei & Wasserman 2019)."""
    p = np.asarray(p, np.float64)
    s: F64 = 1.0 - p
    rows, top = np.arange(len(p)), p.argmax(1)
    others = p.copy()
    others[rows, top] = 0.0
    s[rows, top] = others.sum(1)
    return s


def raps(p: Array, *, k_reg: int, penalty: float, u: Array | float = 1.0) -> F64:
    """Regularised adaptive score minus one (Angelopoulos et al. 2021, arXiv:2009.14193).

    ``-(tail below c) - (1-u) p_c + penalty * max(0, rank_c - k_reg)``, ranks from 1; ``u`` scalar
    or N in [0, 1], 1 being the deterministic score. penalty 0 is APS.
    """
    p = np.asarray(p, np.float64)
    order = np.argsort(-p, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, 1)
    below = np.zeros_like(ranked)
    below[:, :-1] = np.cumsum(ranked[:, :0:-1], 1)[:, ::-1]
    ranks = np.arange(1, p.shape[1] + 1)
    uu = np.broadcast_to(np.asarray(u, np.float64), len(p))[:, None]
    s: F64 = -(below + (1.0 - uu) * ranked) + penalty * np.maximum(0, ranks - k_reg)
    out = np.empty_like(s)
    np.put_along_axis(out, order, s, 1)
    return out


def class_scores(method: str, settings: Mapping[str, Any], p: Array, u: Array | float = 1.0) -> F64:
    """Scores N×C of a method; FitError for an unknown one."""
    if method == "lac":
        return lac(p)
    if method == "raps":
        return raps(p, k_reg=settings["k_reg"], penalty=settings["penalty"], u=u)
    raise FitError(f"unknown conformal method {method!r}; there are {', '.join(METHODS)}")


def emit_class_scores(
    g: Fragment,
    method: str,
    settings: Mapping[str, Any],
    p: str,
    top: str,
    classes: int,
    u: str | None = None,
) -> str:
    """The same as a graph fragment over probabilities N×C; ``top`` is their argmax, N."""
    if method == "lac":
        here = g.op("Equal", g.unsqueeze(top, 1), g.const(range(classes), "int64"))
        others = g.sum(g.op("Where", here, g.const(0.0), p), 1, keepdims=True)
        return g.op("Where", here, others, g.op("Sub", g.const(1.0), p))
    ranked, order = g.op2("TopK", p, g.const([classes], "int64"), axis=-1)
    below = g.op("CumSum", ranked, g.const(1, "int64"), reverse=1, exclusive=1)
    ranks = np.arange(1, classes + 1)
    penalties = settings["penalty"] * np.maximum(0, ranks - settings["k_reg"])
    score = g.op("Sub", g.const(penalties[None]), below)
    shape = g.op("Shape", order)
    blank = g.op("Expand", g.const(0.0), shape)
    return g.op("ScatterElements", blank, order, score, axis=1)


def choose_raps(
    p: Array, y: Array, alpha: float, penalties: tuple[float, ...] = (0.001, 0.01, 0.1, 0.2, 0.5)
) -> dict[str, Any]:
    """k_reg and penalty for RAPS from calibration rows (never from conformal ones).

    k_reg is the (1-alpha) quantile of the true label's rank; the penalty is the one with the
    smallest mean set on the same rows (Angelopoulos et al. 2021, appendix E).
    """
    p, y = np.asarray(p, np.float64), np.asarray(y)
    rank = (p > p[np.arange(len(p)), y][:, None]).sum(1) + 1
    k_reg = int(np.quantile(rank, 1 - alpha, method="higher"))
    sizes = {}
    for penalty in penalties:
        s = raps(p, k_reg=k_reg, penalty=penalty)
        true = np.sort(s[np.arange(len(p)), y])
        q = true[min(len(true) - 1, int(np.ceil((len(true) + 1) * (1 - alpha))) - 1)]
        sizes[penalty] = float((s <= q).sum(1).mean())
    best = min(sizes, key=lambda k: (sizes[k], k))
    return {"k_reg": k_reg, "penalty": best}
