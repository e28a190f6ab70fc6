"""Class weights when classes come in other shares than they did, from rows without labels.

The ratio of production to labelled class shares, w_c. ``em`` raises the likelihood of production
probabilities (Saerens, Latinne & Decaestecker 2002, Neural Computation 14): right where the
probabilities are calibrated class by class, which a temperature alone does not do and
``class_weights`` therefore does first (Alexandari, Kundaje & Shrikumar 2020, arXiv:1901.06852).
``bbse`` solves the confusion matrix (Lipton,
Wang & Smola 2018, arXiv:1802.03916): right whatever the probabilities, where it can be inverted.
"""

from __future__ import annotations

import numpy as np

from calibration.families import apply_family, fit_family
from posthoc.contract import F64, Array, FitError

ROUNDS = 1000
CLOSE = 1e-8
SINGULAR = 0.02  # of the smallest singular value of the confusion matrix, whose columns sum to one


def em(source: Array, target: Array) -> F64:
    """Weights C from source class shares C and production probabilities M×C.

    A class that the source never shows cannot be weighed, and has the largest weight of the others.
    Raises FitError for no rows.
    """
    share, p = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if len(p) == 0:
        raise FitError("no production rows to learn class shares from")
    seen = share > 0
    w = np.where(seen, 1.0, 0.0)
    for _ in range(ROUNDS):
        tilted = p * w
        total = tilted.sum(1, keepdims=True)
        here = (tilted / np.where(total > 0, total, 1.0)).mean(0)
        new = np.where(seen, here / np.where(seen, share, 1.0), 0.0)
        done = np.abs(new - w).max() < CLOSE
        w = new
        if done:
            break
    return np.where(seen, w, w.max())


def class_weights(p: Array, y: Array, target: Array) -> F64:
    """Weights C from labelled probabilities N×C with classes N, and production ones M×C, both from
    the same model: `em` after structured vector scaling. Source shares are the means of what was
    scaled, so that without a shift the weights are one.

    Raises FitError for no rows of either.
    """
    p, target = np.asarray(p, np.float64), np.asarray(target, np.float64)
    if len(p) == 0 or len(target) == 0:
        raise FitError("no production rows to learn class shares from")
    with np.errstate(divide="ignore"):
        log_p, fresh = np.log(p), np.log(target)
    scaled = fit_family("svs", log_p, y)
    seen = np.bincount(np.asarray(y, np.int64), minlength=p.shape[1]) > 0
    share = np.exp(apply_family(scaled, log_p)).mean(0)
    return em(np.where(seen, share, 0.0), np.exp(apply_family(scaled, fresh)))


def bbse(said: Array, y: Array, target: Array, classes: int) -> F64:
    """Weights C from labels ``said`` N by the model, true ones ``y`` N, and labels that it said of
    production rows M.

    Raises FitError where the confusion matrix is too nearly singular to be solved.
    """
    said, y, target = (np.asarray(v, np.int64) for v in (said, y, target))
    seen = np.bincount(y, minlength=classes) > 0
    joint = np.zeros((classes, classes))
    np.add.at(joint, (said, y), 1.0 / max(1, len(y)))
    kept = joint[:, seen]
    given = kept / kept.sum(0)
    least = float(np.linalg.svd(given, compute_uv=False)[-1])
    if least < SINGULAR:
        raise FitError(
            "the model confuses classes so that their shares cannot be told from its labels (the "
            f"smallest singular value of its confusion matrix is {least:.4f})"
        )
    shares = np.bincount(target, minlength=classes) / max(1, len(target))
    w = np.clip(np.linalg.lstsq(kept, shares, rcond=None)[0], 0.0, None)
    out = np.full(classes, w.max(initial=1.0))
    out[seen] = w
    return out
