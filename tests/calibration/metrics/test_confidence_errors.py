"""Equal-mass, top-label, smooth and KS calibration errors against slow definitions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.calibration import calibration_curve

from calibration.metrics.equal_mass import confidence_bins, equal_mass_ece
from calibration.metrics.ks import ks_error, ks_totals
from calibration.metrics.smooth import smooth_ece, smooth_totals
from calibration.metrics.top_label import top_label_bins, top_label_ece
from calibration.metrics.totals import BIN_EDGES, ClassificationTotals, update_classification
from calibration.metrics.uce import equal_mass_edges
from posthoc.contract import F64, DataError
from posthoc.folds import Fold, run

modest = settings(deadline=None, derandomize=True, max_examples=40)
FIGURES = (equal_mass_ece, ks_error, smooth_ece)


def rows(n: int, seed: int, levels: int | None = None) -> tuple[F64, F64]:
    """Confidences, with exact 0 and 1 and (with ``levels``) ties, and outcomes."""
    rng = np.random.default_rng(seed)
    c = rng.beta(4, 1.5, n) if levels is None else rng.integers(0, levels + 1, n) / levels
    c[: n // 10] = np.round(c[: n // 10])
    return c, (rng.random(n) < c**1.5).astype(np.float64)


def split(fold: Fold[Any, Any, Any], cut: int, **columns: Any) -> Any:
    head, tail = (
        {k: v[part] for k, v in columns.items()} for part in (slice(cut), slice(cut, None))
    )
    return fold.merge(fold.update(fold.init(), head), fold.update(fold.init(), tail))


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 90), cut=st.integers(0, 90))
def test_equal_mass_by_a_slow_loop_however_split(seed: int, n: int, cut: int) -> None:
    c, right = rows(n, seed, levels=8 if seed % 2 else None)
    ranked = sorted(c)
    edges = [ranked[math.ceil(n * b / 5) - 1] for b in range(1, 5)]
    np.testing.assert_array_equal(equal_mass_edges(c, 5), edges)
    gap = worst = 0.0
    for low, high in itertools.pairwise([-1.0, *edges, 1.0]):
        inside = (low < c) & (c <= high)
        if inside.any():
            d = abs(right[inside].mean() - c[inside].mean())
            gap, worst = gap + inside.mean() * d, max(worst, d)
    assert equal_mass_ece(c, right, 5) == pytest.approx(gap, abs=1e-12)
    merged = split(confidence_bins(np.array(edges)), cut, confidence=c, right=right)
    assert (merged.n, merged.ece) == (n, pytest.approx(gap, abs=1e-12))
    assert merged.max_gap == pytest.approx(worst, abs=1e-12)


def test_equal_mass_bins_are_scikit_learns_and_equal_widths_are_ece() -> None:
    c, right = rows(400, 0)
    c = np.random.default_rng(1).permutation(np.linspace(0.01, 0.99, 400))
    want_right, want_c = calibration_curve(right, c, n_bins=10, strategy="quantile")
    got = run(confidence_bins(equal_mass_edges(c, 10)), [{"confidence": c, "right": right}])
    np.testing.assert_array_equal(got.count, 40)
    np.testing.assert_allclose(got.confidence_sum / got.count, want_c)
    np.testing.assert_allclose(got.correct / got.count, want_right)
    wide = run(confidence_bins(BIN_EDGES[:-1]), [{"confidence": c, "right": right}])
    zeros = np.zeros(400, np.int64)
    totals = update_classification(
        ClassificationTotals(), confidence=c, label=zeros, y=(right == 0).astype(np.int64)
    )
    assert wide.ece == pytest.approx(totals.ece)


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 80), cut=st.integers(0, 80))
def test_top_label_is_ece_within_each_label(seed: int, n: int, cut: int) -> None:
    c, right = rows(n, seed)
    label = np.random.default_rng(seed).integers(0, 3, n)
    want, each = 0.0, []
    for k in range(3):
        inside = label == k
        zeros = np.zeros(int(inside.sum()), np.int64)
        totals = update_classification(
            ClassificationTotals(),
            confidence=c[inside],
            label=zeros,
            y=(right[inside] == 0).astype(np.int64),
        )
        each.append(totals.ece)
        want += 0.0 if math.isnan(totals.ece) else totals.ece * inside.mean()
    assert top_label_ece(c, label, right, 3) == pytest.approx(want, abs=1e-12)
    merged = split(top_label_bins(3), cut, confidence=c, label=label, right=right)
    assert merged.ece == pytest.approx(want, abs=1e-12)
    np.testing.assert_allclose(merged.per_label, each, atol=1e-12)


def test_top_label_sees_what_cancels() -> None:
    c, label = np.full(200, 0.75), np.repeat([0, 1], 100)
    right = np.concatenate([np.ones(100), np.repeat([0, 1], 50)])  # 100 % and 50 %
    assert equal_mass_ece(c, right) == pytest.approx(0)
    assert top_label_ece(c, label, right, 2) == pytest.approx(0.25)


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 80), cut=st.integers(0, 80))
def test_ks_by_a_slow_loop_and_within_its_bound_as_a_fold(seed: int, n: int, cut: int) -> None:
    c, right = rows(n, seed, levels=6 if seed % 2 else None)
    want = max(abs(sum(r - q for q, r in zip(c, right, strict=True) if q <= t)) / n for t in c)
    assert ks_error(c, right) == pytest.approx(want, abs=1e-12)
    merged = split(ks_totals, cut, confidence=c, right=right)
    assert merged.ks.value <= want + 1e-12
    assert want <= merged.ks.value + merged.ks.error + 1e-12
    each = [abs((right - c)[c == t].sum()) for t in set(c)]
    assert want <= sum(each) / n + 1e-12


def test_ks_of_a_model_that_is_always_too_sure_is_its_gap() -> None:
    c = np.linspace(0.5, 1, 300)
    right = np.zeros(300)
    assert ks_error(c, right) == pytest.approx(c.mean())
    many = np.random.default_rng(0).beta(5, 1, 100_000)
    outcome = np.random.default_rng(1).random(100_000) < many**2
    streamed = run(ks_totals, [{"confidence": many, "right": outcome}]).ks
    assert streamed.error < 2e-4
    assert ks_error(many, outcome) == pytest.approx(streamed.value, abs=streamed.error + 1e-12)


def slow_smooth(c: F64, right: F64, bandwidth: float) -> float:
    """The paper's integral: images of the kernel beyond both ends, trapezoids between 0 and 1."""
    t = np.linspace(0, 1, 4001)
    total = np.zeros(len(t))
    for q, r in zip(c, right, strict=True):
        for m in range(-4, 5):
            for image in (2 * m + q, 2 * m - q):
                total += (r - q) * norm.pdf(t, image, bandwidth) / len(c)
    return float(np.trapezoid(np.abs(total), t))


@pytest.mark.parametrize("bandwidth", [0.02, 0.1, 0.5, 1.0])
def test_smoothed_error_is_the_reflected_kernels(bandwidth: float) -> None:
    for seed in range(3):
        c, right = rows(25, seed)
        totals = run(smooth_totals, [{"confidence": c, "right": right}])
        assert totals.at(bandwidth) == pytest.approx(slow_smooth(c, right, bandwidth), abs=2e-4)


@modest
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), cut=st.integers(0, 60))
def test_smooth_ece_is_its_own_bandwidth_however_split(seed: int, n: int, cut: int) -> None:
    c, right = rows(n, seed)
    got = smooth_ece(c, right)
    merged = split(smooth_totals, cut, confidence=c, right=right)
    assert merged.smooth_ece == pytest.approx(got, abs=1e-9)
    assert merged.at(got) == pytest.approx(got, abs=1e-8)
    falling = [merged.at(s) for s in (0.01, 0.05, 0.2, 1.0)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(falling))
    assert abs((right - c).mean()) - 1e-9 <= merged.at(0.3) <= np.abs(right - c).mean() + 1e-9


def test_smooth_ece_changes_little_when_confidences_do() -> None:
    # Half of the rows just below a bin's edge and half above it: what binned ECE is blind to.
    c = np.where(np.arange(2000) % 2 == 0, 0.8 - 1e-4, 0.8 + 1e-4)
    right = (np.arange(2000) % 2 == 0).astype(np.float64)
    right[: 2000 // 5 * 3] = 1.0
    moved = smooth_ece(c + 1e-4, right) - smooth_ece(c, right)
    assert abs(moved) < 2e-4
    assert abs(equal_mass_ece(c, right, 2) - smooth_ece(c, right)) > 0.05


def test_certainties() -> None:
    sure, right, wrong = np.ones(50), np.ones(50), np.zeros(50)
    for figure in FIGURES:
        assert figure(sure, right) == 0
        assert figure(sure, wrong) == pytest.approx(1)
        assert figure(1 - sure, right) == pytest.approx(1)
        assert figure(np.full(40, 0.5), np.repeat([0.0, 1.0], 20)) == pytest.approx(0, abs=1e-9)


def test_one_distinct_confidence_is_the_gap_to_the_accuracy() -> None:
    c, right = np.full(100, 0.7), np.repeat([0.0, 1.0], 50)
    assert equal_mass_ece(c, right) == pytest.approx(0.2)
    assert ks_error(c, right) == pytest.approx(0.2)
    assert smooth_ece(c, right) == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize("figure", FIGURES)
def test_bad_rows_are_named(figure: Any) -> None:
    with pytest.raises(DataError, match="at least 1 row"):
        figure(np.zeros(0), np.zeros(0))
    with pytest.raises(DataError, match="row 1: confidence nan"):
        figure(np.array([0.5, np.nan]), np.zeros(2))
    with pytest.raises(DataError, match=r"row 0: confidence 1\.5"):
        figure(np.array([1.5, 0.5]), np.zeros(2))
    with pytest.raises(DataError, match="row 1: right is nan"):
        figure(np.array([0.5, 0.5]), np.array([1, np.nan]))
    with pytest.raises(DataError, match="confidence has shape"):
        figure(np.zeros(3), np.zeros(2))


def test_folds_of_no_rows_are_nan_and_other_edges_do_not_add() -> None:
    bins = confidence_bins(np.array([0.5]))
    assert math.isnan(run(bins, []).ece) and math.isnan(run(bins, []).max_gap)
    assert math.isnan(run(top_label_bins(2), []).ece)
    assert math.isnan(run(ks_totals, []).ks.value)
    assert math.isnan(run(smooth_totals, []).smooth_ece)
    assert math.isnan(run(smooth_totals, []).at(0.1))
    with pytest.raises(DataError, match="different edges"):
        bins.merge(bins.init(), confidence_bins(np.array([0.4])).init())
    for edges in (np.array([0.5, 0.4]), np.array([np.nan]), np.zeros((1, 1))):
        with pytest.raises(DataError, match="ascending"):
            confidence_bins(edges)
    with pytest.raises(DataError, match="label 2"):
        top_label_ece(np.array([0.5]), np.array([2]), np.array([1]), 2)
