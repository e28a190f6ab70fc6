"""A posterior of all parameters of a small head, as a factor F of their covariance F F'.

The state of `posthoc.methods.laplace.full` for a classification, and of a full posterior that was
imported. ``centre`` D is what a graph takes off the features first. ``factor`` is C×K×J for
K = D + 1 parameters a class (the bias last); ``draws`` S×C×K are fixed draws of the head;
``roots`` C×K×K and ``root`` K×K are roots of the quadratic forms that give the variance of each
logit, and the mean over pairs of classes of the variance of a difference: a sum of squares loses
less in float32 than a product with a covariance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import F64, Array, State
from posthoc.links import Spread, SpreadNames, normal_draws
from posthoc.methods.laplace import sums

if TYPE_CHECKING:
    from posthoc.graph import Fragment


def tensors(factor: F64, centre: F64, draws: int, seed: int) -> dict[str, Array]:
    """The tensors of a state, with so many draws from a random seed."""
    c, k, j = factor.shape
    drawn = factor.reshape(c * k, j) @ normal_draws(j, seed, draws).T
    roots = np.stack([triangle(f.T) for f in factor])
    made: dict[str, Array] = {
        "centre": centre,
        "factor": factor,
        "draws": np.ascontiguousarray(drawn.T).reshape(draws, c, k),
        "roots": roots,
    }
    if c > 1:
        apart = np.tensordot(sums.centred_basis(c), factor, 1) * np.sqrt(2.0 / (c - 1))
        tall = apart.transpose(0, 2, 1).reshape(-1, k)
        made["root"] = triangle(tall)
    return made


def spread(state: State, phi: Array) -> Spread:
    """What the posterior adds to the outputs of N rows (float64 definition)."""
    t = state.tensors
    x = sums.exact(phi)
    alone = np.stack([((x @ root) ** 2).sum(1) for root in t["roots"]], 1)
    if state.settings["task"] == "regression":
        return Spread(alone, np.sqrt(alone), np.eye(alone.shape[1]))
    s, c, k = t["draws"].shape
    drawn = (x @ t["draws"].reshape(s * c, k).T).reshape(-1, s, c)
    return Spread(((x @ t["root"]) ** 2).sum(1), draws=drawn, class_variance=alone)


def emit(g: Fragment, state: State, phi: str) -> SpreadNames:
    """The same as a graph fragment."""
    t = state.tensors
    centred = g.op("Sub", phi, g.const(t["centre"]))

    def project(table: Array) -> str:
        """[phi, 1] @ table, for K×anything."""
        return g.op("Gemm", centred, g.const(table[:-1]), g.const(_at(t["centre"], table)))

    s, c, k = t["draws"].shape
    y = project(t["roots"].transpose(1, 0, 2).reshape(k, c * k))
    y = g.op("Reshape", g.op("Mul", y, y), g.const([0, c, k], "int64"))
    alone = g.sum(y, 2)
    if state.settings["task"] == "regression":
        return SpreadNames(alone, g.op("Sqrt", alone), np.eye(c))
    drawn = g.op("Reshape", project(t["draws"].reshape(s * c, k).T), g.const([0, s, c], "int64"))
    y = project(t["root"])
    variance = g.sum(g.op("Mul", y, y), 1, keepdims=True)
    return SpreadNames(variance, draws=drawn, class_variance=alone)


def _at(centre: F64, table: Array) -> F64:
    return np.asarray(centre @ table[:-1] + table[-1])


def joint(state: State, phi: Array) -> F64:
    """Covariance N×C×N×C of the outputs of N rows together."""
    factor = state.tensors["factor"]
    y = np.einsum("nk,ckj->ncj", sums.exact(phi), factor, optimize=True)
    n, c = y.shape[:2]
    flat = y.reshape(n * c, -1)
    return np.asarray(flat @ flat.T).reshape(n, c, n, c)


def triangle(tall: F64) -> F64:
    """Lower triangular L with L L' = A'A and no negative diagonal: the only one, so that draws do
    not turn with an eigenvector's sign."""
    lower: F64 = np.ascontiguousarray(np.asarray(np.linalg.qr(tall, mode="r")).T)
    lower *= np.where(np.diag(lower) < 0, -1.0, 1.0)
    return lower
