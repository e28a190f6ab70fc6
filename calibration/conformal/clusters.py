"""Classes that err alike, clustered (Ding, Angelopoulos, Bates, Jordan & Tibshirani 2023,
"Class-conditional conformal prediction with many classes", arXiv:2306.09335).

With many classes and few rows of each, a threshold for every class is +inf or loose. Classes whose
scores are distributed alike share one: each is described by quantiles of its scores, and these are
clustered by k-means, a class weighing the root of its rows. Everything here is done on calibration
rows, so that the conformal rows of a cluster stay exchangeable with those that come.
"""

from __future__ import annotations

import math

import numpy as np

from calibration.conformal.cells import UNKNOWN
from posthoc.contract import F64, I64, Array

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the quantiles that describe a class
ROWS = 150  # of a cluster, on the average
ROUNDS = 100


def fit_clusters(scores: Array, y: Array, classes: int, alpha: float) -> I64:
    """The cluster of each class, C, counted from 0; UNKNOWN for a class with fewer than 1/alpha - 1
    rows, which knows too little of itself and takes the threshold of all rows.

    ``scores`` N are those of the true classes ``y`` N, ``alpha`` the smallest level that is asked.
    """
    s, y = np.asarray(scores, np.float64), np.asarray(y, np.int64)
    count = np.bincount(y, minlength=classes)
    known = np.flatnonzero(count >= max(1, math.ceil(round(1 / alpha, 9)) - 1))
    out = np.full(classes, UNKNOWN, np.int64)
    if len(known) == 0:
        return out
    levels = [*LEVELS, 1 - alpha]
    described = np.stack(
        [np.quantile(s[y == c], levels, method="inverted_cdf") for c in known.tolist()]
    )
    wanted = min(len(known), max(1, int(count[known].sum()) // ROWS))
    found = k_means(described, np.sqrt(count[known]), wanted)
    out[known] = np.unique(found, return_inverse=True)[1]  # an empty cluster is none
    return out


def k_means(points: Array, weights: Array, clusters: int) -> I64:
    """The cluster of each of N points N×D with weights N: Lloyd's algorithm, from the farthest
    points and from equal shares of the order of their means, the better of the two. Without a
    random number, so that it says the same every time."""
    x, w = np.asarray(points, np.float64), np.asarray(weights, np.float64)
    centres = [x[int(np.argmax(w))]]
    while len(centres) < clusters:
        away = np.min([_distance(x, c) for c in centres], axis=0)
        centres.append(x[int(np.argmax(away * w))])
    order = np.argsort(x.mean(1), kind="stable")
    share = np.empty(len(x), np.int64)
    share[order] = np.minimum(np.cumsum(w[order]) / w.sum() * clusters, clusters - 1).astype(int)
    starts = (np.argmin([_distance(x, c) for c in centres], axis=0), share)
    tried = [_lloyd(x, w, start, clusters) for start in starts]
    return min(tried, key=lambda found: found[0])[1]


def _lloyd(x: F64, w: F64, start: Array, clusters: int) -> tuple[float, I64]:
    """(weighted sum of squares within, the cluster of each point)."""
    found = np.asarray(start, np.int64)
    middle = np.full((clusters, x.shape[1]), np.inf)  # nobody's, until it has a point
    for _ in range(ROUNDS):
        for k in np.unique(found):
            here = found == k
            middle[k] = np.average(x[here], axis=0, weights=w[here])
        new = np.argmin([_distance(x, c) for c in middle], axis=0)
        if np.array_equal(new, found):
            break
        found = new
    return float(w @ _distance(x, middle[found])), found


def _distance(x: F64, centre: F64) -> F64:
    return np.asarray(((x - centre) ** 2).sum(1))
