"""What confidence says without labels, against slow loops and streams with a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.drift.label_free import (
    EXPECTED_ASSUMES,
    STRATIFIED_ASSUMES,
    expected_accuracy,
    measured_bias,
    post_stratified,
)
from calibration.metrics.totals import (
    N_BINS,
    ClassificationTotals,
    bin_index,
    update_classification,
)
from posthoc.contract import DataError


def by_bin(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    index = bin_index(confidence)
    count = np.bincount(index, minlength=N_BINS)
    return count, np.bincount(index, confidence, N_BINS)


def labelled(confidence: np.ndarray, right: np.ndarray) -> ClassificationTotals:
    return update_classification(
        ClassificationTotals(),
        confidence=confidence,
        label=right.astype(int),
        y=np.ones(len(right)),
    )


@settings(deadline=None, derandomize=True, max_examples=50)
@given(c=st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_expected_accuracy_is_mean_confidence_with_a_binomial_spread(c: list[float]) -> None:
    found = expected_accuracy(*by_bin(np.asarray(c)))
    n = len(c)
    own = math.sqrt(sum(x * (1 - x) for x in c)) / n
    assert found.n == n
    assert found.accuracy == pytest.approx(sum(c) / n)
    # Bins forget where in them a row was, a twentieth at most: never too narrow, hardly too wide.
    assert own - 1e-9 <= found.spread <= math.sqrt(own**2 + 0.025**2 / n) + 1e-9


def test_accuracy_lies_as_far_from_the_expected_as_the_spread_says() -> None:
    rng = np.random.default_rng(0)
    c = rng.beta(5, 1, 2000)
    found = expected_accuracy(*by_bin(c))
    accuracy = (rng.random((4000, 2000)) < c).mean(axis=1)
    assert accuracy.mean() == pytest.approx(found.accuracy, abs=4 * found.spread / math.sqrt(4000))
    assert accuracy.std() == pytest.approx(found.spread, rel=0.05)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(seed=st.integers(0, 1000), n=st.integers(1, 80), m=st.integers(0, 80))
def test_post_stratified_figures_equal_the_slow_loop(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    served = rng.integers(0, 30, N_BINS)
    c, right = rng.random(n), rng.random(n) < 0.7
    totals = labelled(c[: min(n, m)], right[: min(n, m)])
    found = post_stratified(served, totals)
    known = [b for b in range(N_BINS) if served[b] and totals.count[b]]
    whole = sum(served[b] for b in known)
    if not known:
        assert found.share == 0 and math.isnan(found.accuracy) and math.isnan(found.ece)
        return
    accuracy = ece = variance = mean = spread = 0.0
    for b in known:
        w, rows = served[b] / whole, totals.count[b]
        a, conf = totals.correct[b] / rows, totals.confidence_sum[b] / rows
        accuracy += w * a
        ece += w * abs(a - conf)
        smooth = (totals.correct[b] + 1) / (rows + 2)
        variance += w**2 * smooth * (1 - smooth) / rows
        s = w * math.sqrt(conf * (1 - conf) / rows)
        mean += math.sqrt(2 / math.pi) * s
        spread += (1 - 2 / math.pi) * s**2
    assert found.accuracy == pytest.approx(accuracy)
    assert found.ece == pytest.approx(ece)
    assert found.accuracy_error == pytest.approx(math.sqrt(variance))
    assert found.ece_floor == pytest.approx(mean + 3 * math.sqrt(spread))
    assert found.share == pytest.approx(whole / served.sum())


def test_labels_in_the_shares_that_were_served_change_nothing() -> None:
    rng = np.random.default_rng(0)
    c = rng.beta(5, 1, 3000)
    totals = labelled(c, rng.random(3000) < c)
    found = post_stratified(7 * totals.count, totals)
    assert found.accuracy == pytest.approx(totals.accuracy)
    assert found.ece == pytest.approx(totals.ece)
    mean = totals.confidence_sum[totals.count > 0] / totals.count[totals.count > 0]
    v = totals.count[totals.count > 0] * mean * (1 - mean)  # statistics of the alert's floor
    floor = np.sqrt(2 / math.pi * v).sum() + 3 * math.sqrt((1 - 2 / math.pi) * v.sum())
    assert found.ece_floor == pytest.approx(floor / totals.n)
    assert found.share == 1


def test_labels_missing_by_confidence_bias_the_raw_figures_and_not_these() -> None:
    rng = np.random.default_rng(0)
    raw, weighed, inside = [], [], 0
    for _ in range(300):
        c = rng.beta(4, 1, 4000)
        right = rng.random(4000) < c**1.5  # over-confident
        asked = rng.random(4000) < np.where(c < 0.7, 0.5, 0.1)  # of doubtful rows most
        totals = labelled(c[asked], right[asked])
        found = post_stratified(by_bin(c)[0], totals)
        truth = right.mean()
        raw.append(totals.accuracy - truth)
        weighed.append(found.accuracy - truth)
        inside += abs(found.accuracy - truth) <= 2 * found.accuracy_error
    assert np.mean(raw) < -0.1
    assert abs(np.mean(weighed)) < 0.003
    assert 0.93 <= inside / 300 <= 0.995


def test_labels_missing_by_correctness_bias_both() -> None:
    rng = np.random.default_rng(0)
    c = rng.beta(4, 1, 20_000)
    right = rng.random(20_000) < c
    asked = rng.random(20_000) < np.where(right, 0.1, 0.3)  # users report what was wrong
    found = post_stratified(by_bin(c)[0], labelled(c[asked], right[asked]))
    assert found.accuracy < right.mean() - 0.1
    assert "depends on whether the model was right" in STRATIFIED_ASSUMES
    assert "calibrated" in EXPECTED_ASSUMES


@settings(deadline=None, derandomize=True, max_examples=50)
@given(seed=st.integers(0, 1000), n=st.integers(1, 80))
def test_bias_equals_the_slow_loop(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    served = rng.integers(0, 30, N_BINS)
    c, right = rng.random(n), rng.random(n) < 0.7
    totals = labelled(c, right)
    found = measured_bias(served, totals)
    bins = bin_index(c)
    raw = sum(x - r for x, r in zip(c, right, strict=True)) / n
    smooth = [(totals.correct[b] + 1) / (totals.count[b] + 2) for b in range(N_BINS)]
    gap = [c[bins == b].mean() - right[bins == b].mean() if b in bins else 0 for b in range(N_BINS)]
    variance = sum(smooth[b] * (1 - smooth[b]) + (gap[b] - raw) ** 2 for b in bins) / n**2
    assert (found.n, found.raw) == (n, pytest.approx(raw))
    assert found.raw_error == pytest.approx(math.sqrt(variance))
    known = [b for b in range(N_BINS) if served[b] and b in bins]
    whole = sum(served[b] for b in known)
    if known:
        weighed = sum(served[b] * gap[b] for b in known) / whole
        assert found.stratified == pytest.approx(weighed)
        assert found.share == pytest.approx(whole / served.sum())


def test_bias_is_that_of_all_rows_where_labels_miss_by_confidence_alone() -> None:
    """The 95 % intervals hold the truth that often: of the raw bias that of the labelled rows, of
    the stratified one that of all; and less the bias, the expected accuracy is the true one."""
    rng = np.random.default_rng(0)
    inside, raw_inside, wide, left, claims = 0, 0, [], [], []
    # Of all rows that may get a label, by the integral over Beta(4, 1).
    x = (np.arange(20_000) + 0.5) / 20_000
    w = 4 * x**3 * np.where(x < 0.7, 0.5, 0.1)
    asked_bias = float(w @ (x - x**1.5)) / w.sum()
    for _ in range(300):
        c = rng.beta(4, 1, 4000)
        true = c**1.5  # over-confident
        share = np.where(c < 0.7, 0.5, 0.1)  # of doubtful rows most get a label
        right, asked = rng.random(4000) < true, rng.random(4000) < share
        found = measured_bias(by_bin(c)[0], labelled(c[asked], right[asked]))
        inside += abs(found.stratified - (c - true).mean()) <= 1.96 * found.stratified_error
        raw_inside += abs(found.raw - asked_bias) <= 1.96 * found.raw_error
        wide.append(found.raw > 3 * found.spread)
        left.append(expected_accuracy(*by_bin(c)).accuracy - found.stratified - true.mean())
        claims.append(expected_accuracy(*by_bin(c)).accuracy - true.mean())
    assert 0.92 <= inside / 300 <= 0.985
    assert 0.92 <= raw_inside / 300 <= 0.98
    assert all(wide)  # 3 spreads tell this bias from chance
    assert np.mean(claims) > 0.06 > 0.003 > abs(np.mean(left))


def test_of_a_calibrated_model_bias_is_chance() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(1000):
        c = rng.beta(8, 1, 300)
        found.append(measured_bias(by_bin(c)[0], labelled(c, rng.random(300) < c)))
    beyond = np.mean([abs(f.raw) > 2 * f.spread for f in found])
    assert 0.03 < beyond < 0.065
    z = [f.raw / f.raw_error for f in found]
    assert 0.93 <= np.mean(np.abs(z) <= 1.96) <= 0.985
    none = measured_bias(np.ones(N_BINS), ClassificationTotals())
    assert none.n == 0 and none.share == 0
    assert all(math.isnan(x) for x in (none.raw, none.raw_error, none.spread, none.stratified))


def test_a_calibrated_model_stays_below_the_floor() -> None:
    rng = np.random.default_rng(0)
    above = 0
    for _ in range(1000):
        c = rng.beta(4, 1, 1500)
        asked = rng.random(1500) < np.where(c < 0.7, 0.5, 0.1)
        found = post_stratified(
            by_bin(c)[0], labelled(c[asked], rng.random(asked.sum()) < c[asked])
        )
        above += found.ece > found.ece_floor
    assert above <= 10


def test_no_rows_and_what_cannot_be_used() -> None:
    none = expected_accuracy(np.zeros(20), np.zeros(20))
    assert none.n == 0 and math.isnan(none.accuracy) and math.isnan(none.spread)
    assert math.isnan(post_stratified(np.zeros(20), ClassificationTotals()).share)
    with pytest.raises(DataError, match="sums of confidence"):
        expected_accuracy(np.ones(20), np.ones(19))
    with pytest.raises(DataError, match="outside"):
        expected_accuracy(np.ones(2), np.asarray([0.5, 1.5]))
    for served in (np.ones(19), -np.ones(20)):
        with pytest.raises(DataError, match="20 counts by bin"):
            post_stratified(served, ClassificationTotals())
