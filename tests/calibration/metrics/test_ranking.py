"""Ranking figures against scikit-learn, slow loops and the papers' identities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from calibration.metrics.ranking import (
    aupr,
    auroc,
    auroc_difference,
    auroc_estimate,
    fpr95,
    risk_coverage,
)
from posthoc.contract import DataError

modest = settings(deadline=None, derandomize=True, max_examples=60)
# Few distinct values, so that ties within and across the sides are the rule.
sides = st.lists(st.integers(0, 6), min_size=1, max_size=40)


@modest
@given(negatives=sides, positives=sides)
def test_auroc_aupr_and_fpr95_equal_scikit_learn_with_ties(
    negatives: list[int], positives: list[int]
) -> None:
    neg, pos = np.array(negatives, dtype=float), np.array(positives, dtype=float)
    score = np.concatenate([neg, pos])
    truth = np.repeat([0, 1], [len(neg), len(pos)])
    assert auroc(neg, pos) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    assert aupr(neg, pos) == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    # What is accepted as in-distribution is the positive of FPR95: low scores.
    fpr, tpr, _ = roc_curve(1 - truth, -score, drop_intermediate=False)
    assert fpr95(neg, pos) == pytest.approx(fpr[np.argmax(tpr >= 0.95 - 1e-12)], abs=1e-12)


def test_perfect_and_hopeless_scores() -> None:
    low, high = np.arange(100.0), np.arange(100.0) + 1000
    assert (auroc(low, high), aupr(low, high), fpr95(low, high)) == (1, 1, 0)
    assert (auroc(high, low), fpr95(high, low)) == (0, 1)
    assert auroc(low, low) == 0.5


def test_infinite_scores_rank_and_nan_is_named() -> None:
    assert auroc(np.array([-np.inf, 0.0]), np.array([np.inf])) == 1
    with pytest.raises(DataError, match="positives: row 1 is NaN"):
        auroc(np.zeros(2), np.array([0.0, np.nan]))
    with pytest.raises(DataError, match="negatives"):
        fpr95(np.zeros(0), np.zeros(1))


def test_auroc_interval_covers_and_narrows_with_rows() -> None:
    truth, hits = 0.7602499, 0  # Phi(1 / sqrt 2)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        got = auroc_estimate(rng.standard_normal(150), rng.standard_normal(80) + 1)
        hits += got.low <= truth <= got.high
        assert got.low < got.value < got.high
    assert hits >= 270


def test_paired_auroc_difference_is_delong_s_written_out() -> None:
    rng = np.random.default_rng(0)
    for n, m in ((30, 20), (7, 50)):
        (neg_a, neg_b), (pos_a, pos_b) = (
            rng.normal(shift, 1, (2, k)).round(1) for k, shift in ((n, 0), (m, 1))
        )
        neg_b, pos_b = (neg_a + neg_b) / 2, (pos_a + pos_b) / 2
        placed = []
        for neg, pos in ((neg_a, pos_a), (neg_b, pos_b)):
            win = np.array([[(p > q) + (p == q) / 2 for q in neg] for p in pos])
            placed.append((win.mean(1), win.mean(0)))
        # The covariance matrices of both scores' placements, eq. 5 of the paper, and L = (1, -1).
        s10, s01 = (np.cov(np.stack([placed[0][i], placed[1][i]])) for i in (0, 1))
        contrast = np.array([1, -1])
        deviation = np.sqrt(contrast @ (s10 / m + s01 / n) @ contrast)
        got = auroc_difference((neg_a, pos_a), (neg_b, pos_b))
        assert got.value == pytest.approx(auroc(neg_a, pos_a) - auroc(neg_b, pos_b), abs=1e-12)
        assert got.high - got.low == pytest.approx(2 * 1.959964 * deviation, rel=1e-6)


def test_paired_auroc_difference_covers_nought_and_is_narrow() -> None:
    hits, narrower = 0, 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        sides = [rng.normal(shift, 1, k) for k, shift in ((150, 0.0), (80, 1.0))]
        a, b = ([x + rng.normal(0, 0.7, len(x)) for x in sides] for _ in range(2))
        got = auroc_difference((a[0], a[1]), (b[0], b[1]))
        hits += got.low <= 0 <= got.high
        alone = [auroc_estimate(*x) for x in (a, b)]
        narrower += got.high - got.low < np.hypot(*(e.high - e.low for e in alone))
    assert 276 <= hits <= 297 and narrower >= 295
    same = auroc_difference((a[0], a[1]), (a[0] * 2, a[1] * 2))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(DataError, match="same rows"):
        auroc_difference((a[0], a[1]), (a[0][1:], a[1]))


def test_auroc_interval_over_groups_covers_where_rows_do_not() -> None:
    truth, hits = 0.7602499, {"rows": 0, "groups": 0}
    groups = np.repeat(np.arange(40), 6)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        # Within a group rows are nearly copies; every row is N(0 or 1, 1).
        neg, pos = (
            0.95 * rng.standard_normal(40)[groups]
            + np.sqrt(1 - 0.95**2) * rng.standard_normal(240)
            + shift
            for shift in (0, 1)
        )
        for name, g in (("rows", None), ("groups", groups)):
            got = auroc_estimate(neg, pos, negative_groups=g, positive_groups=g)
            hits[name] += got.low <= truth <= got.high
    assert hits["groups"] >= 178
    assert hits["rows"] <= 150


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60))
def test_areas_equal_the_slow_loop(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    confidence, loss = rng.permutation(n) / n, rng.random(n)
    order = sorted(range(n), key=lambda i: -confidence[i])
    total, aurc, augrc, before = 0.0, 0.0, 0.0, 0.0
    got = risk_coverage(confidence, loss)
    for k, i in enumerate(order, start=1):
        total += loss[i]
        assert got.coverage[k - 1] == pytest.approx(k / n)
        assert got.risk[k - 1] == pytest.approx(total / k)
        aurc += total / k / n
        augrc += (before + total / n) / 2 / n
        before = total / n
    assert got.aurc == pytest.approx(aurc)
    assert got.augrc == pytest.approx(augrc)


@modest
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 8))
def test_augrc_identity(seed: int, levels: int) -> None:
    # AUGRC = (1 - AUROC of errors)·accuracy·error + error²/2, ties included (Traub et al. 2024).
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, levels, 50) / levels
    wrong = np.concatenate([[True, False], rng.random(48) < 0.3])
    error = wrong.mean()
    rank = roc_auc_score(wrong, -confidence)
    want = (1 - rank) * (1 - error) * error + error**2 / 2
    assert risk_coverage(confidence, wrong).augrc == pytest.approx(want, abs=1e-12)


def test_augrc_limits() -> None:
    wrong = np.repeat([0, 1], [80, 20])
    assert risk_coverage(1.0 - wrong, wrong).augrc == pytest.approx(0.2**2 / 2)
    assert risk_coverage(np.ones(100), wrong).augrc == pytest.approx(0.2 / 2)
    assert risk_coverage(np.ones(100), wrong).aurc == pytest.approx(0.2)


def test_ties_are_the_mean_over_every_order() -> None:
    confidence = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    loss = np.array([0.0, 1.0, 0.0, 0.2, 1.0])
    curves = []
    for order in itertools.permutations([1, 2, 3]):
        picked = loss[[0, *order, 4]]
        curves.append(np.cumsum(picked) / np.arange(1, 6))
    got = risk_coverage(confidence, loss)
    np.testing.assert_allclose(got.risk, np.mean(curves, axis=0))
    shuffled = np.random.default_rng(0).permutation(5)
    np.testing.assert_allclose(risk_coverage(confidence[shuffled], loss[shuffled]).risk, got.risk)


def test_loss_of_other_rows_is_refused() -> None:
    with pytest.raises(DataError, match="loss has 3 rows"):
        risk_coverage(np.zeros(4), np.zeros(3))


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), levels=st.integers(1, 8))
def test_excess_is_over_the_order_by_the_loss(seed: int, n: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    confidence, loss = rng.integers(0, levels, n) / levels, rng.random(n)
    got = risk_coverage(confidence, loss)
    oracle = risk_coverage(-loss, loss)
    assert got.e_aurc == pytest.approx(got.aurc - oracle.aurc, abs=1e-12)
    assert got.e_aurc >= -1e-12
    assert oracle.e_aurc == pytest.approx(0, abs=1e-12)


def test_risk_at_a_coverage_and_coverage_at_a_risk() -> None:
    wrong = np.array([0, 0, 1, 0, 0, 1, 0, 1, 1, 1])
    got = risk_coverage(1 - np.arange(10) / 10, wrong)
    assert got.risk_at(0.2) == 0
    assert got.risk_at(0.3) == pytest.approx(1 / 3)
    assert got.risk_at(0.25) == pytest.approx(1 / 3)  # the third row is needed for a quarter
    assert got.risk_at(1.0) == 0.5 and got.risk_at(1e-9) == 0
    assert got.coverage_at(0.2) == pytest.approx(0.5)
    assert got.coverage_at(1 / 3) == pytest.approx(0.7)  # 2 of 7: beyond the rise to 1/3
    assert got.coverage_at(1.0) == 1 and risk_coverage(np.ones(4), np.ones(4)).coverage_at(0.5) == 0
    tied = risk_coverage(np.full(10, 0.5), wrong)
    assert tied.risk_at(0.3) == pytest.approx(0.5)  # in expectation over their order
    for share in (0.0, 1.1, np.nan):
        with pytest.raises(DataError, match="share of rows"):
            got.risk_at(share)
    with pytest.raises(DataError, match="row 1: loss nan"):
        risk_coverage(np.zeros(2), np.array([0.0, np.nan]))
