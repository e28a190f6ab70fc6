"""The peer's side of the table of small samples: MAPIE 1.6 in its own environment.

Only `bench.peers` starts this module, with the interpreter of that environment. APS is asked for
randomised; by default its sets keep their last class, and so cover more than they promise. RAPS is
left out: it takes a fifth of the conformal rows for a penalty, stratified by class, so that it has
fewer rows than it was given, and refuses twenty.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from mapie.classification import SplitConformalClassifier
from sklearn.base import BaseEstimator, ClassifierMixin

from bench.conformal_peer import serve_side

warnings.filterwarnings("ignore")  # it warns of every sample that lacks a class
STATE = np.random.RandomState(0)


class Softmax(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier whose features are logits."""

    def __init__(self, classes: int = 2) -> None:
        self.classes = classes
        self.classes_ = np.arange(classes)

    def fit(self, x: Any, y: Any) -> Softmax:
        """Nothing to fit."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict_proba(self, x: Any) -> Any:
        """N×C."""
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def predict(self, x: Any) -> Any:
        """N."""
        return x.argmax(1)


def sets(score: str, z: Any, y: Any, new: Any, alphas: Sequence[float]) -> list[Any]:
    """As `bench.conformal_peer.Sets`."""
    made = SplitConformalClassifier(
        Softmax(z.shape[1]),
        confidence_level=[1 - a for a in alphas],
        conformity_score=score,
        random_state=STATE,
    ).conformalize(z, y)
    how = {"include_last_label": "randomized"} if score == "aps" else {}
    _, found = made.predict_set(new, conformity_score_params=how)
    return [found[:, :, i] for i in range(len(alphas))]


if __name__ == "__main__":
    serve_side(sets, "mapie", "scikit-learn")
