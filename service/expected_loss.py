"""The expected loss of a served row, from the score that the loss head gives it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration.bundle import Manifest
from posthoc.contract import Array

SCORE = "expected_loss"


@dataclass(frozen=True, slots=True)
class LossScale:
    """A bundle's ``ood_score`` is (expected loss - ``mean``) / ``scale``."""

    mean: float
    scale: float

    def total(self, score: Array) -> float:
        """The sum of expected losses of N rows from their scores; in nats, or of a regression in
        mean squared errors of the fit."""
        # A loss is never below 0; float32 may leave it a hair there.
        return max(
            0.0, len(score) * self.mean + self.scale * float(np.sum(score, dtype=np.float64))
        )


def loss_scale(manifest: Manifest) -> LossScale | None:
    """Of a bundle whose score is ``expected_loss`` alone, of rows; None for any other: means of
    several scores and of ranks are no loss, and of maps the score is not kept."""
    ood = manifest.ood
    if ood is None or ood.score.name != SCORE or manifest.dense is not None:
        return None
    found = ood.score.settings[SCORE]
    return LossScale(float(found["mean"]), float(found["scale"]))
