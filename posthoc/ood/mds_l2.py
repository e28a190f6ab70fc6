"""Mahalanobis distance of normed features to the nearest class mean: MDS++.

As `posthoc.ood.mds` of phi / |phi| (Mueller & Hein, ICML 2025, arXiv:2505.18032): norms that
differ between classes are no longer taken for distance.
"""

from __future__ import annotations

from posthoc.contract import Info, Paper
from posthoc.ood.class_distance import Nearest

INFO = Info(
    name="mds_l2",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"features", "labels"}),
    summary="Mahalanobis distance to the nearest class mean, features of length one (MDS++)",
    paper=Paper(
        "Mahalanobis++: Improving OOD Detection via Feature Normalization",
        2025,
        "https://arxiv.org/abs/2505.18032",
    ),
)

_own = Nearest(INFO.name, unit=True)
init, update, merge = _own.init, _own.update, _own.merge
finish, score, emit = _own.finish, _own.score, _own.emit
