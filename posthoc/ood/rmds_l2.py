"""Relative Mahalanobis distance of normed features to the class means: RMDS++.

As `posthoc.ood.rmds` of phi / |phi| (Mueller & Hein, ICML 2025, arXiv:2505.18032).
"""

from __future__ import annotations

from posthoc.contract import Info, Paper
from posthoc.ood.class_distance import Relative

INFO = Info(
    name="rmds_l2",
    kind="score",
    tasks=("classification",),
    needs=frozenset({"features", "labels"}),
    summary="relative Mahalanobis distance, features of length one (RMDS++)",
    paper=Paper(
        "Mahalanobis++: Improving OOD Detection via Feature Normalization",
        2025,
        "https://arxiv.org/abs/2505.18032",
    ),
)

_own = Relative(INFO.name, unit=True)
init, update, merge = _own.init, _own.update, _own.merge
finish, score, emit = _own.finish, _own.score, _own.emit
