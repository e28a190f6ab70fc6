"""Sparsification against removing pixels one by one, and its closed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.metrics.ranking import risk_coverage
from calibration.metrics.sparsification import (
    REMOVED,
    ause,
    image_ause,
    mean_sparsification,
    sparsification,
)
from posthoc.contract import DataError
from posthoc.folds import run

modest = settings(deadline=None, derandomize=True, max_examples=60)


def removing(error: np.ndarray, by: np.ndarray, root: bool) -> list[float]:
    """Relative error left after removing 0, 1, … n-1 pixels of the largest ``by``."""
    order = sorted(range(len(error)), key=lambda i: by[i])
    curve = [np.mean(error[order[: len(error) - k]]) / np.mean(error) for k in range(len(error))]
    return [math.sqrt(c) for c in curve] if root else curve


@modest
@given(st.integers(0, 1000), st.integers(1, 250), st.booleans())
def test_the_areas_are_those_of_removing_pixels(seed: int, n: int, root: bool) -> None:
    rng = np.random.default_rng(seed)
    error, uncertainty = rng.gamma(1, 1, n), rng.normal(size=n)
    curve, best = removing(error, uncertainty, root), removing(error, error, root)
    found = sparsification(error, uncertainty, root=root)
    assert found.ause == pytest.approx(np.mean(curve) - np.mean(best), abs=1e-12)
    assert found.random == pytest.approx(1 - np.mean(best), abs=1e-12)
    at = [math.floor(k * n / 100) for k in range(100)]
    np.testing.assert_allclose(found.curve, [curve[k] for k in at], atol=1e-12)
    np.testing.assert_allclose(found.oracle, [best[k] for k in at], atol=1e-12)


def test_a_perfect_ranking_a_reversed_one_and_a_constant() -> None:
    error = np.random.default_rng(0).gamma(1, 1, (300, 10)).astype(np.float32)
    best = sparsification(error, error**3)
    assert best.ause == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(best.curve, best.oracle)
    assert best.curve[0] == pytest.approx(1) and len(best.curve) == len(REMOVED)
    assert ause(error, -error) > best.random > 0
    flat = sparsification(error, np.ones_like(error))
    assert flat.ause == pytest.approx(flat.random)
    np.testing.assert_allclose(flat.curve, 1)


def test_random_orders_average_the_random_baseline() -> None:
    rng = np.random.default_rng(0)
    error = rng.gamma(1, 1, 60)
    areas = [ause(error, rng.random(60)) for _ in range(2000)]
    want = sparsification(error, error).random
    assert abs(np.mean(areas) - want) < 3 * np.std(areas) / math.sqrt(2000)


@settings(modest, max_examples=15)
@given(st.integers(0, 1000))
def test_ties_are_removed_in_random_order_in_expectation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    error, uncertainty = rng.gamma(1, 1, 8), rng.integers(0, 3, 8).astype(float)
    shuffled = []
    for _ in range(400):
        order = rng.permutation(8)
        shuffled.append(np.mean(removing(error[order], uncertainty[order], False)))
    want = np.mean(shuffled) - np.mean(removing(error, error, False))
    spread = np.std(shuffled) / 20
    assert abs(ause(error, uncertainty) - want) <= 5 * spread + 1e-12
    place = rng.permutation(8)
    assert ause(error[place], uncertainty[place]) == pytest.approx(ause(error, uncertainty))


@modest
@given(st.integers(0, 1000), st.integers(1, 200), st.booleans())
def test_it_is_the_area_under_risk_and_coverage(seed: int, n: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    error, uncertainty = rng.gamma(1, 1, n), rng.normal(size=n)
    uncertainty = np.round(uncertainty) if ties else uncertainty
    areas = [risk_coverage(-by, error).aurc for by in (uncertainty, error)]
    assert ause(error, uncertainty) == pytest.approx((areas[0] - areas[1]) / error.mean())


def test_pixels_without_truth_are_left_out() -> None:
    rng = np.random.default_rng(0)
    error, uncertainty = rng.gamma(1, 1, (20, 20)), rng.random((20, 20))
    hole = rng.random((20, 20)) < 0.3
    want = ause(error[~hole], uncertainty[~hole])
    uncertainty[hole & (uncertainty > 0.5)] = np.nan  # whatever is claimed there
    assert ause(np.where(hole, np.nan, error), uncertainty) == want


def test_the_mean_over_images_is_no_pooled_figure() -> None:
    """σ that tells only hard images from easy ones is worth nothing within an image."""
    rng = np.random.default_rng(0)
    hard = np.repeat([1.0, 10.0, 100.0, 1000.0], 400).reshape(4, 20, 20)
    error = rng.gamma(2, 1, hard.shape) * hard
    columns = image_ause(error, hard)
    np.testing.assert_allclose(columns["ause"], columns["ause_random"])
    pooled = sparsification(error, hard)
    assert pooled.ause < 0.2 * pooled.random


@modest
@given(st.integers(0, 1000), st.integers(0, 5), st.booleans())
def test_batches_and_merges_give_the_mean_of_the_images(seed: int, cut: int, root: bool) -> None:
    rng = np.random.default_rng(seed)
    batch = {"error": rng.gamma(1, 1, (5, 6, 7)), "uncertainty": rng.random((5, 6, 7))}
    batch["error"][2] = 0  # without an error nothing can be removed
    fold = mean_sparsification(root=root)
    parts = [{k: v[s] for k, v in batch.items()} for s in (slice(cut), slice(cut, None))]
    each = [sparsification(e, u, root=root) for e, u in zip(*batch.values(), strict=True)]
    kept = [s for s in each if not math.isnan(s.ause)]
    a, b = (fold.update(fold.init(), p) for p in parts)
    assert len(kept) == 4 == fold.merge(a, b).images
    for found in (fold.result(fold.merge(b, a)), run(fold, parts)):
        assert found.ause == pytest.approx(np.mean([s.ause for s in kept]))
        assert found.random == pytest.approx(np.mean([s.random for s in kept]))
        np.testing.assert_allclose(found.curve, np.mean([s.curve for s in kept], axis=0))
        np.testing.assert_allclose(found.oracle, np.mean([s.oracle for s in kept], axis=0))
    assert math.isnan(run(fold, []).ause)


def test_a_negative_error_is_refused() -> None:
    with pytest.raises(DataError, match="lies below 0"):
        sparsification(np.array([1.0, -1.0]), np.ones(2))
