"""The Bayesian bootstrap of a regression head: weighted ridge regressions in closed form.

Under weights w of the rows, the difference of output k's head from the frozen one solves
(sum of w phi~ phi~' + d s_k I) x = sum of w phi~ (y_k - z_k), with prior precision d and s_k the
mean square of the frozen model's error. Memory of a fit is (D+1)² float64 numbers for each member
fitted at one time, at most 1 GB or one member.
"""

from __future__ import annotations

import numpy as np

from posthoc.contract import F64, FitError, LinearHead, State
from posthoc.methods.heads.blocks import Block, blocks, measure
from posthoc.methods.heads.members import MEMORY, Refit, check_size, values_state
from posthoc.methods.heads.weights import PILOT, Weights
from posthoc.methods.laplace.prior import Spectrum, by_evidence
from posthoc.rows import Rows

WIDE = np.dtype(np.float64)
FLOOR = 1e-12  # of the frozen noise, for members that pass through every label


def fit_values(name: str, rows: Rows, head: LinearHead, weights: Weights, settings: Refit) -> State:
    """Refit the head of a regression once a member.

    The noise variance is the mean square that the mean member leaves, over rows less effective
    parameters. Raises FitError where the frozen model makes no error to learn a noise from.
    """
    check_size(name, head, settings.members)
    k, d = head.weight.shape
    frozen = sum((_error(b) ** 2).sum(0) for b in blocks(rows, WIDE)) / rows.n
    if not np.all(frozen > 0):
        raise FitError(f"{name}: the model predicts the labels without error; check for leakage")
    (gram,), _ = _sums(rows, weights, [PILOT], d + 1, k)
    h = np.divide.outer(np.maximum(np.linalg.eigvalsh(gram), 0.0), frozen)
    norm = float((head.weight**2).sum() + (head.bias**2).sum())
    precision = settings.prior_precision or by_evidence(Spectrum(h, norm))[0]
    heads = np.empty((settings.members, d + 1, k))
    group = max(1, MEMORY // gram.nbytes)
    for first in range(0, settings.members, group):
        who = list(range(first, min(first + group, settings.members)))
        for m, a, b in zip(who, *_sums(rows, weights, who, d + 1, k), strict=True):
            for j in range(k):
                ridge = a + precision * frozen[j] * np.eye(d + 1)
                heads[m, :, j] = np.linalg.solve(ridge, b[:, j])
    mean = heads.mean(0)
    left = sum(((_error(b) - b.phi @ mean) ** 2).sum(0) for b in blocks(rows, WIDE))
    gamma = (h / (h + precision)).sum(0)
    noise = np.maximum(left / np.maximum(rows.n - gamma, 1.0), FLOOR * frozen)
    said = {
        **settings.model_dump(),
        "task": "regression",
        "prior_precision": precision,
        "rows": rows.n,
        "noise_variance": [float(v) for v in noise],
    }
    return values_state(heads, measure(rows)[1], said)


def _error(block: Block) -> F64:
    return np.asarray(block.y, WIDE) - np.asarray(block.z, WIDE)


def _sums(rows: Rows, weights: Weights, members: list[int], d: int, k: int) -> tuple[F64, F64]:
    """Sums over rows of w phi~ phi~' (S×d×d) and w phi~ (y - z)' (S×d×k)."""
    gram, moment = np.zeros((len(members), d, d)), np.zeros((len(members), d, k))
    for block in blocks(rows, WIDE):
        root = np.sqrt(weights.of(block.index, len(block), members)[0])
        error = _error(block)
        for i in range(len(members)):
            scaled = block.phi * root[:, i : i + 1]
            gram[i] += scaled.T @ scaled
            moment[i] += scaled.T @ (error * root[:, i : i + 1])
    return gram, moment
