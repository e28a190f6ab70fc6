"""Mahalanobis distance to the nearest class mean (Lee et al. 2018, arXiv:1807.03888).

score = min_c (phi - mu_c)' S^-1 (phi - mu_c), with S the covariance within classes, shrunk because
features of a narrow network are often collinear. `posthoc.ood.mahalanobis` is the distance to the
common mean and needs no labels.
"""

from __future__ import annotations

from posthoc.contract import Info, Paper
from posthoc.ood.class_distance import Nearest

INFO = Info(
    name="mds",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"features", "labels"}),
    summary="Mahalanobis distance of the features to the nearest class mean",
    paper=Paper(
        "A Simple Unified Framework for Detecting Out-of-Distribution Samples "
        "and Adversarial Attacks",
        2018,
        "https://arxiv.org/abs/1807.03888",
    ),
)

_own = Nearest(INFO.name)
init, update, merge = _own.init, _own.update, _own.merge
finish, score, emit = _own.finish, _own.score, _own.emit
