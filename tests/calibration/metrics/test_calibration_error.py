"""Debiased ECE: no bias where there is no miscalibration, and intervals that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from calibration.metrics.calibration_error import debiased_ece, ece_difference, perfect_band
from calibration.metrics.totals import ClassificationTotals, bin_index, update_classification
from posthoc.contract import DataError

Rows = tuple[np.ndarray, np.ndarray]


def model(n: int, seed: int, sharpness: float = 1.0) -> Rows:
    """Confidences of a model whose logits are ``sharpness`` times the true ones, and the truth."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(2.2, 1.6, n)
    right = rng.random(n) < 1 / (1 + np.exp(-logit))
    return 1 / (1 + np.exp(-sharpness * logit)), right


def totals(rows: Rows) -> ClassificationTotals:
    confidence, right = rows
    label = np.zeros(len(right), dtype=np.int64)
    return update_classification(
        ClassificationTotals(), confidence=confidence, label=label, y=1 - right.astype(np.int64)
    )


def true_ece(sharpness: float) -> float:
    """Binned ECE of a million rows with their true probabilities in place of outcomes."""
    logit = np.random.default_rng(99).normal(2.2, 1.6, 1_000_000)
    c = 1 / (1 + np.exp(-sharpness * logit))
    gap = np.bincount(bin_index(c), c - 1 / (1 + np.exp(-logit)))
    return float(np.abs(gap).sum() / len(c))


@pytest.mark.parametrize(("n", "c"), [(100, 0.5), (400, 0.8), (2000, 0.97)])
def test_expectation_over_every_outcome_of_a_calibrated_bin(n: int, c: float) -> None:
    # c sits within a bin; each count of hits is weighed by its binomial probability.
    bin_of_c = int(bin_index(np.array([c]))[0])
    count, confidence = np.zeros(20, dtype=np.int64), np.zeros(20)
    count[bin_of_c], confidence[bin_of_c] = n, n * c
    plug_in = debiased = 0.0
    for k in range(n + 1):
        correct = np.zeros(20, dtype=np.int64)
        correct[bin_of_c] = k
        t = ClassificationTotals(count=count, correct=correct, confidence_sum=confidence)
        p = float(binom(n, c).pmf(k))
        plug_in += p * t.ece
        debiased += p * debiased_ece(t)
    assert plug_in == pytest.approx(math.sqrt(2 / math.pi * c * (1 - c) / n), rel=0.03)
    assert abs(debiased) < 0.03 * plug_in


def test_slow_definition() -> None:
    rows = model(400, 0, 1.5)
    c, right = rows
    want = 0.0
    for b in range(20):
        inside = bin_index(c) == b
        if (n := inside.sum()) > 0:
            d = abs(right[inside].mean() - c[inside].mean())
            s = math.sqrt(c[inside].mean() * (1 - c[inside].mean()) / n)
            want += n / 400 * (d - 2 / math.sqrt(math.pi) * s * math.exp(-((d / s) ** 2) / 2))
    assert debiased_ece(totals(rows)) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("n", [500, 2000])
def test_a_perfect_model_averages_zero(n: int) -> None:
    made = [totals(model(n, seed)) for seed in range(300)]
    debiased = np.array([debiased_ece(t) for t in made])
    assert abs(debiased.mean()) < 0.001 + 3 * debiased.std() / math.sqrt(300)
    assert np.mean([t.ece for t in made]) > 0.02


@pytest.mark.parametrize("sharpness", [1.1, 1.3, 2.0])
def test_a_miscalibrated_model_is_nearer_its_truth_than_the_plug_in(sharpness: float) -> None:
    made = [totals(model(500, seed, sharpness)) for seed in range(200)]
    truth = true_ece(sharpness)
    debiased = np.mean([debiased_ece(t) for t in made])
    plug_in = np.mean([t.ece for t in made])
    assert abs(debiased - truth) < 0.8 * abs(plug_in - truth)
    many = totals(model(400_000, 0, sharpness))
    assert debiased_ece(many) == pytest.approx(truth, abs=0.003)


def test_certainties_and_no_rows() -> None:
    sure = (np.ones(50), np.ones(50, dtype=bool))
    assert debiased_ece(totals(sure)) == pytest.approx(0, abs=1e-12)
    assert debiased_ece(totals((sure[0], ~sure[1]))) == pytest.approx(1)
    assert math.isnan(debiased_ece(ClassificationTotals()))


def test_band_of_one_bin_is_binomial() -> None:
    band = perfect_band(np.full(200, 0.8), n_sim=4000, seed=0)
    low, high = binom(200, 0.8).ppf([0.025, 0.975]) / 200
    assert band.accuracy_low[15] == pytest.approx(low, abs=0.006)
    assert band.accuracy_high[15] == pytest.approx(high, abs=0.006)
    assert np.isnan(np.delete(band.accuracy_low, 15)).all()
    k = np.arange(201)
    gap = np.abs(k / 200 - 0.8)
    order = np.argsort(gap)
    reached = np.cumsum(binom(200, 0.8).pmf(k)[order])
    assert band.ece[1] == pytest.approx(gap[order][np.searchsorted(reached, 0.975)], abs=0.006)


def test_perfect_models_lie_in_their_band() -> None:
    inside = {"ece": 0, "debiased": 0}
    for seed in range(200):
        rows = model(600, seed)
        band = perfect_band(rows[0], n_sim=200, seed=seed)
        made = totals(rows)
        inside["ece"] += band.ece[0] <= made.ece <= band.ece[1]
        inside["debiased"] += band.debiased_ece[0] <= debiased_ece(made) <= band.debiased_ece[1]
    # 95 % nominal; the ends are themselves estimated from 200 draws.
    assert min(inside.values()) >= 178
    sharp = model(600, 0, 2.0)
    assert totals(sharp).ece > perfect_band(sharp[0]).ece[1]


def test_band_in_pieces_is_a_band(monkeypatch: pytest.MonkeyPatch) -> None:
    c = model(500, 0)[0]
    whole = perfect_band(c, n_sim=300)
    monkeypatch.setattr("calibration.metrics.calibration_error._DRAWS", 7 * 500)
    pieces = perfect_band(c, n_sim=300)
    assert pieces.ece == whole.ece and pieces.debiased_ece == whole.debiased_ece


@pytest.mark.parametrize("sharpness", [1.05, 1.3, 2.0])
def test_difference_intervals_cover(sharpness: float) -> None:
    truth, hits = true_ece(sharpness), 0
    for seed in range(120):
        (a, right), (b, _) = model(1000, seed, sharpness), model(1000, seed)
        got = ece_difference((a, right), (b, right), n_boot=100, seed=seed)
        hits += got.low <= truth <= got.high
    assert hits >= 102  # 85 %: simulation found 89-98 % over many more


def test_difference_to_itself_is_nothing_and_groups_widen_it() -> None:
    rows = model(400, 0, 1.5)
    same = ece_difference(rows, rows, n_boot=20)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    twice = tuple(np.repeat(x, 2) for x in rows)
    other = tuple(np.repeat(x, 2) for x in model(400, 0))
    row = ece_difference(twice, other, n_boot=300)  # type: ignore[arg-type]
    group = ece_difference(twice, other, groups=np.repeat(np.arange(400), 2), n_boot=300)  # type: ignore[arg-type]
    assert group.value == row.value
    assert 1.2 < (group.high - group.low) / (row.high - row.low) < 1.7  # sqrt(2) in theory


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(DataError, match="at least one row"):
        perfect_band(np.zeros(0))
    a, b = model(10, 0), model(11, 0)
    with pytest.raises(DataError, match="same rows"):
        ece_difference(a, b)
