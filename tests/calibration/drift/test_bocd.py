"""BOCD's predictive against scipy's Student-t, and its run lengths against every segmentation."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.special import gammaln
from scipy.stats import t as student

from calibration.drift import bocd
from calibration.drift.run_length import State, begin
from posthoc.contract import F64


def scipys(z: F64, x: float) -> float:
    """Log predictive of x after z, from sums (Murphy 2007, equations 86-90 and 110)."""
    n = len(z)
    kappa, alpha = 1 + n, 1 + n / 2
    mean = z.sum() / kappa
    beta = 1.0
    if n:
        beta += 0.5 * ((z - z.mean()) ** 2).sum() + n * z.mean() ** 2 / (2 * kappa)
    return float(
        student.logpdf(x, 2 * alpha, mean, math.sqrt(beta * (kappa + 1) / (alpha * kappa)))
    )


def log_evidence(z: F64) -> float:
    """Log marginal likelihood of a segment (Murphy 2007, equation 95)."""
    n = len(z)
    kappa, alpha = 1 + n, 1 + n / 2
    beta = 1.0
    if n:
        beta += 0.5 * ((z - z.mean()) ** 2).sum() + n * z.mean() ** 2 / (2 * kappa)
    return float(
        gammaln(alpha)
        - gammaln(1)
        - alpha * math.log(beta)
        - 0.5 * math.log(kappa)
        - n / 2 * math.log(2 * math.pi)
    )


@pytest.mark.parametrize("n", [0, 1, 2, 10, 200])
def test_the_predictive_is_a_student_t(n: int) -> None:
    z, model = np.random.default_rng(n).normal(0.5, 2, n), bocd.Model()
    stats = model.prior()[None, None]
    for i, x in enumerate(z):
        stats = model.updated(stats, np.array([i]), np.array([x]))
    for x in (-4.0, 0.0, 1.3, 30.0):
        found = model.log_density(stats, np.array([n]), np.array([x]))[0, 0]
        assert found == pytest.approx(scipys(z, x), rel=1e-9)


def test_the_run_lengths_are_those_of_all_segmentations() -> None:
    """The posterior by enumeration: every set of change points, its prior from gaps whose hazard
    depends on their length, times the closed-form evidence of its segments."""
    rng = np.random.default_rng(0)
    reference = rng.normal(size=50)
    hazard = [0.02, 0.3, 0.1, 0.25, 0.05]
    state: State[bocd.Model] = bocd.start(reference, hazard=hazard, keep=100, contamination=0.0)
    z0 = (reference - state.scale.centre) / state.scale.spread
    z = np.concatenate((rng.normal(size=5), rng.normal(2.5, 1, size=6)))

    def ends(length: int) -> float:
        return hazard[min(length, len(hazard)) - 1]

    for upto in range(1, len(z) + 1):
        x = z[upto - 1] * state.scale.spread[0] + state.scale.centre[0]
        state, _ = bocd.step(state, x)
        weights: dict[int, float] = {}
        for cut in product((False, True), repeat=upto):  # whether the segment ends after each point
            log_p, segment = 0.0, list(z0)
            for value, end in zip(z[:upto], cut, strict=True):
                segment.append(value)
                log_p += math.log(ends(len(segment)) if end else 1 - ends(len(segment)))
                if end:
                    log_p += log_evidence(np.array(segment))
                    segment = []
            log_p += log_evidence(np.array(segment))
            weights[len(segment)] = weights.get(len(segment), 0.0) + math.exp(log_p + 80)
        total = sum(weights.values())
        found = dict(zip(state.lengths.tolist(), np.exp(state.log_weight).tolist(), strict=True))
        assert found.keys() == weights.keys()
        for length, w in weights.items():
            assert found[length] == pytest.approx(w / total, rel=1e-8, abs=1e-12)


def test_an_outlier_carries_the_plain_posterior_away() -> None:
    """What the robust one is for: the mean of a segment after one outlier of 1,000 spreads."""
    state: State[bocd.Model] = begin(
        lambda z: bocd.Model(),
        np.random.default_rng(0).normal(size=(60, 1)),
        bocd.start(np.random.default_rng(0).normal(size=60)).settings,
        0.01,
    )
    moved, _ = bocd.step(state, 1000.0)
    assert abs(moved.stats[0, 0, 0] - state.stats[0, 0, 0]) > 10
