"""The figures of ``GET /v1/calibration`` that only it makes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calibration.metrics.totals import ClassificationTotals, update_classification
from service.summary import noise_floor


def test_a_calibrated_model_hardly_exceeds_the_noise_floor():
    rng = np.random.default_rng(0)
    above = []
    for _ in range(400):
        confidence = rng.beta(4, 1.5, 600)
        right = rng.random(600) < confidence
        totals = update_classification(
            ClassificationTotals(),
            confidence=confidence,
            label=np.zeros(600, int),
            y=np.where(right, 0, 1),
        )
        above.append(totals.ece > noise_floor(totals))
    assert np.mean(above) < 0.01
    off = update_classification(
        ClassificationTotals(),
        confidence=np.full(600, 0.9),
        label=np.zeros(600, int),
        y=rng.random(600) > 0.8,
    )
    assert off.ece > noise_floor(off)
    # One bin by hand: n c (1 - c) = 54.
    exact = (math.sqrt(2 / math.pi * 54) + 3 * math.sqrt((1 - 2 / math.pi) * 54)) / 600
    assert noise_floor(off) == pytest.approx(exact)
    assert math.isnan(noise_floor(ClassificationTotals()))
