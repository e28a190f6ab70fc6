"""Relative Mahalanobis distance to the class means (Ren et al. 2021, arXiv:2106.09022).

score = min_c (phi - mu_c)' S^-1 (phi - mu_c) - (phi - mu)' S0^-1 (phi - mu), with S the covariance
within classes and S0 around the common mean.
"""

from __future__ import annotations

from posthoc.contract import Info, Paper
from posthoc.ood.class_distance import Relative

INFO = Info(
    name="rmds",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"features", "labels"}),
    summary="relative Mahalanobis distance of the features",
    paper=Paper(
        "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection",
        2021,
        "https://arxiv.org/abs/2106.09022",
    ),
)

_own = Relative(INFO.name)
init, update, merge = _own.init, _own.update, _own.merge
finish, score, emit = _own.finish, _own.score, _own.emit
