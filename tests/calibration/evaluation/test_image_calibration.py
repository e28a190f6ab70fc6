"""Calibration error over dependent pixels: slow loops, and simulated calibrated models."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calibration.evaluation.image_calibration import (
    ImageBins,
    debiased_ece,
    ece_difference,
    image_bins,
    perfect_band,
    pixel_bins,
    plug_in_ece,
)
from calibration.metrics import calibration_error
from calibration.metrics.totals import ClassificationTotals, update_classification
from posthoc.contract import DataError

PIXELS = 60


def simulated(
    images: int, seed: int, *, same: int = PIXELS, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and outcome, images×60: runs of ``same`` pixels share one confidence, and one coin
    that is right with probability confidence - shift."""
    rng = np.random.default_rng(seed)
    runs = PIXELS // same
    confidence = rng.uniform(0.5, 1, (images, runs))
    right = rng.random((images, runs)) < confidence - shift
    return confidence.repeat(same, axis=1), right.repeat(same, axis=1)


def bins_of(
    confidence: np.ndarray, right: np.ndarray, groups: np.ndarray | None = None
) -> ImageBins:
    pairs = zip(confidence, right, strict=True)
    return image_bins(np.stack([pixel_bins(c, r) for c, r in pairs]), groups)


def test_against_slow_loops() -> None:
    confidence, right = simulated(30, 0, same=5)
    gaps: dict[int, dict[int, float]] = {}
    count: dict[int, int] = {}
    for i in range(30):
        for p in range(PIXELS):
            b = math.ceil(confidence[i, p] * 20)
            one = gaps.setdefault(b, {})
            one[i] = one.get(i, 0.0) + float(right[i, p]) - confidence[i, p]
            count[b] = count.get(b, 0) + 1
    n = 30 * PIXELS
    plain = sum(abs(sum(g.values())) for g in gaps.values()) / n
    less = 0.0
    for b, g in gaps.items():
        d = abs(sum(g.values())) / count[b]
        s = math.sqrt(sum(v * v for v in g.values())) / count[b]
        less += count[b] / n * (d - 2 / math.sqrt(math.pi) * s * math.exp(-d * d / (2 * s * s)))
    bins = bins_of(confidence, right)
    assert plug_in_ece(bins) == pytest.approx(plain)
    assert debiased_ece(bins) == pytest.approx(less)


def test_plug_in_is_the_ece_of_all_pixels() -> None:
    confidence, right = simulated(20, 1, same=3)
    totals = update_classification(
        ClassificationTotals(), confidence=confidence.ravel(), label=right.ravel(), y=np.ones(1200)
    )
    assert plug_in_ece(bins_of(confidence, right)) == pytest.approx(totals.ece)


@pytest.mark.parametrize("same", [1, 12, 60])
def test_a_calibrated_model_has_none_however_pixels_hang_together(same: int) -> None:
    """The debiased figure averages 0 and lies inside its band; the plug-in and the one for
    independent rows grow with the dependence."""
    debiased, plain, by_rows, inside = [], [], [], 0
    for seed in range(150):
        confidence, right = simulated(80, seed, same=same)
        bins = bins_of(confidence, right)
        band = perfect_band(bins, n_sim=200, seed=seed)
        inside += band.debiased_ece[0] <= debiased_ece(bins) <= band.debiased_ece[1]
        debiased.append(debiased_ece(bins))
        plain.append(plug_in_ece(bins))
        totals = update_classification(
            ClassificationTotals(),
            confidence=confidence.ravel(),
            label=right.ravel(),
            y=np.ones(right.size),
        )
        by_rows.append(calibration_error.debiased_ece(totals))
    assert abs(np.mean(debiased)) < 0.12 * np.mean(plain) + 1e-4
    assert inside >= 0.88 * 150
    if same == PIXELS:
        assert np.mean(by_rows) > 3 * abs(np.mean(debiased))


def test_a_model_that_is_off_is_seen() -> None:
    confidence, right = simulated(400, 3, same=6, shift=0.1)
    bins = bins_of(confidence, right)
    band = perfect_band(bins)
    assert debiased_ece(bins) == pytest.approx(0.1, abs=0.02)
    assert band.debiased_ece[1] < 0.05
    filled = bins.count.sum(0) > 0
    assert np.isnan(band.accuracy_low[~filled]).all()
    assert (band.accuracy_low[filled] <= band.accuracy_high[filled]).all()


def test_groups_are_added_up() -> None:
    confidence, right = simulated(40, 4, same=4)
    groups = np.arange(40) // 2
    joined = bins_of(confidence, right, groups)
    pairs = bins_of(confidence.reshape(20, -1), right.reshape(20, -1))
    for name in ("count", "right", "confidence"):
        np.testing.assert_allclose(getattr(joined, name), getattr(pairs, name))


def test_paired_difference() -> None:
    confidence, right = simulated(200, 5, same=6)
    mine, theirs = bins_of(confidence, right), bins_of(np.minimum(confidence + 0.1, 1), right)
    found = ece_difference(mine, theirs, n_boot=200)
    assert found.value == pytest.approx(debiased_ece(mine) - debiased_ece(theirs))
    assert found.low < found.value < found.high < 0
    assert ece_difference(mine, mine, n_boot=50).high == 0
    with pytest.raises(DataError, match="same images"):
        ece_difference(mine, bins_of(confidence[:5], right[:5]))
