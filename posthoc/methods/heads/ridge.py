"""The Bayesian bootstrap of a regression head: weighted ridge regressions in closed form.

For weights w of the rows, the difference of output k's head from the frozen one solves
(sum of w phi~ phi~' + d s_k I) x = sum of w phi~ (y_k - z_k), with prior precision d and noise
variance s_k. Memory of a fit is (D+1)² float64 numbers for each member fitted at one time.
"""

from __future__ import annotations

import numpy as np

from posthoc.contract import F64, FitError, LinearHead, State
from posthoc.methods.heads.blocks import Block, blocks
from posthoc.methods.heads.curvature import MAX_STEPS, bounded
from posthoc.methods.heads.members import MEMORY, Refit, check_size, values_state
from posthoc.methods.heads.weights import PILOT, Weights
from posthoc.rows import Rows

WIDE = np.dtype(np.float64)


def fit_values(name: str, rows: Rows, head: LinearHead, weights: Weights, settings: Refit) -> State:
    """Refit the head of a regression once a member.

    Raises FitError where the frozen model makes no error, whose noise variance would be zero.
    """
    check_size(name, head, settings.members)
    k, d = head.weight.shape
    (gram,), (moment,) = _sums(rows, weights, [PILOT], d + 1, k)
    squares = sum(((b.y - np.asarray(b.z, WIDE)) ** 2).sum(0) for b in blocks(rows, WIDE))
    if not np.all(squares > 0):
        raise FitError(f"{name}: the model predicts the labels without error; check for leakage")
    precision, noise, gamma = _evidence(
        name, gram, moment, squares, rows.n, head, settings.prior_precision
    )
    heads = np.empty((settings.members, d + 1, k))
    group = max(1, MEMORY // (WIDE.itemsize * (d + 1) ** 2))
    for first in range(0, settings.members, group):
        who = list(range(first, min(first + group, settings.members)))
        for m, a, b in zip(who, *_sums(rows, weights, who, d + 1, k), strict=True):
            for j in range(k):
                ridge = a + precision * noise[j] * np.eye(d + 1)
                heads[m, :, j] = np.linalg.solve(ridge, b[:, j])
    mean = heads.mean(0)
    left = sum(((_error(b) - b.phi @ mean) ** 2).sum(0) for b in blocks(rows, WIDE))
    said = {
        "task": "regression",
        "members": settings.members,
        "prior_precision": precision,
        "rows": rows.n,
        "noise_variance": [float(v) for v in left / np.maximum(rows.n - gamma, 1.0)],
    }
    return values_state(heads, said)


def _error(block: Block) -> F64:
    return np.asarray(block.y, WIDE) - np.asarray(block.z, WIDE)


def _sums(rows: Rows, weights: Weights, members: list[int], d: int, k: int) -> tuple[F64, F64]:
    """Sums over rows of w phi~ phi~' (S×d×d) and w phi~ (y - z)' (S×d×k)."""
    gram, moment = np.zeros((len(members), d, d)), np.zeros((len(members), d, k))
    for block in blocks(rows, WIDE):
        w, _ = weights.of(block.index, len(block), members)
        error = _error(block)
        for i in range(len(members)):
            root = np.sqrt(w[:, i : i + 1])
            scaled = block.phi * root
            gram[i] += scaled.T @ scaled
            moment[i] += scaled.T @ (error * root)
    return gram, moment


def _evidence(
    name: str,
    gram: F64,
    moment: F64,
    squares: F64,
    n: int,
    head: LinearHead,
    given: float | None,
) -> tuple[float, F64, F64]:
    """Prior precision, noise variance K and effective parameters K of all rows alike: MacKay's
    updates d = gamma / |theta|² for the frozen theta and s = residual squares / (n - gamma)."""
    norm = float((head.weight**2).sum() + (head.bias**2).sum())
    if norm == 0.0 and given is None:
        raise FitError(f"{name}: the head's weights are all zero; give a prior_precision")
    mu, q = np.linalg.eigh(gram)
    mu = np.maximum(mu, 0.0)
    turned = q.T @ moment
    floor = 1e-12 * squares / n
    d, noise = given or 1.0, squares / n
    gamma = np.zeros_like(noise)
    for _ in range(MAX_STEPS):
        shrunk = np.multiply.outer(mu, np.ones_like(noise)) + d * noise
        gamma = (mu[:, None] / shrunk).sum(0)
        gain = turned**2 * (2.0 / shrunk - mu[:, None] / shrunk**2)
        fresh = np.maximum((squares - gain.sum(0)) / np.maximum(n - gamma, 1.0), floor)
        new = given or bounded(float(gamma.sum()) / norm)
        same = abs(new - d) <= 1e-8 * d and np.allclose(fresh, noise, rtol=1e-8, atol=0)
        d, noise = new, fresh
        if same:
            break
    return d, noise, gamma
