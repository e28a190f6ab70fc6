"""Figures of dense outputs against slow definitions, scipy, and each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from calibration.conformal.risk import image_losses
from calibration.metrics.class_calibration import class_bins, per_class_ece
from calibration.metrics.correlation import (
    image_correlations,
    merge,
    pearson,
    pooled_moments,
    spearman,
)
from calibration.metrics.dense import image_estimates, image_figures, share_uncovered
from calibration.metrics.totals import N_BINS, bin_index
from calibration.metrics.uce import (
    equal_mass_edges,
    equal_width_edges,
    uncertainty_calibration_error,
    variance_bins,
)
from posthoc.contract import DataError
from posthoc.folds import run

modest = settings(deadline=None, derandomize=True, max_examples=60)


def maps(seed: int, n: int = 3, ties: bool = False, holes: bool = False) -> dict[str, np.ndarray]:
    """n float32 images of 5×4 pixels: absolute errors, NaN where there is no truth, and σ."""
    rng = np.random.default_rng(seed)
    sigma = rng.gamma(1, 1, (n, 5, 4))
    error = np.abs(rng.standard_normal(sigma.shape)) * sigma
    if ties:
        sigma, error = np.round(sigma), np.round(error)
    if holes:
        error[rng.random(error.shape) < 0.2] = np.nan
    return {"error": error.astype(np.float32), "uncertainty": sigma.astype(np.float32)}


def laves(squared_error: np.ndarray, variance: np.ndarray, bins: int) -> float:
    """UCE pixel by pixel: bins closed on the right, the first on both sides."""
    pixels = [(e, v) for e, v in zip(squared_error.flat, variance.flat, strict=True) if e == e]
    low, high = min(v for _, v in pixels), max(v for _, v in pixels)
    uppers = [float(x) for x in np.linspace(low, high, bins + 1)[1:]]
    uce = 0.0
    for b in range(bins):
        inside = [
            (e, v)
            for e, v in pixels
            if next((i for i, edge in enumerate(uppers) if v <= edge), bins - 1) == b
        ]
        if inside:
            gap = np.mean([e for e, _ in inside]) - np.mean([v for _, v in inside])
            uce += len(inside) / len(pixels) * abs(gap)
    return uce


@modest
@given(st.integers(0, 1000), st.integers(1, 25), st.booleans(), st.booleans())
def test_uce_is_its_definition(seed: int, bins: int, ties: bool, holes: bool) -> None:
    batch = maps(seed, ties=ties, holes=holes)
    e, v = batch["error"].astype(float) ** 2, batch["uncertainty"].astype(float) ** 2
    got = uncertainty_calibration_error(e, v, bins)
    assert got == pytest.approx(laves(e, v, bins), rel=1e-9, abs=1e-12)


def test_variance_bins_are_closed_on_the_right() -> None:
    fold = variance_bins(equal_width_edges(0, 4, 4))
    variance = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])  # 5 lies in the open last bin
    totals = fold.update(fold.init(), {"squared_error": variance, "variance": variance})
    assert totals.count.tolist() == [2, 1, 1, 2] and totals.uce == 0


def test_a_right_constant_variance_has_uce_zero_and_an_honest_one_nearly() -> None:
    rng = np.random.default_rng(0)
    variance = rng.gamma(2, 1, (20, 100, 100))
    squared = variance * rng.standard_normal(variance.shape) ** 2
    flat = np.full_like(variance, squared.mean())
    assert uncertainty_calibration_error(squared, flat) < 1e-9
    assert uncertainty_calibration_error(squared, variance) < 0.02
    for factor in (0.5, 3.0):
        got = uncertainty_calibration_error(squared, factor * variance)
        assert got == pytest.approx(abs(factor - 1) * 2, rel=0.02)


@modest
@given(st.integers(0, 1000), st.integers(0, 4), st.booleans())
def test_uce_of_batches_is_that_of_all(seed: int, cut: int, mass: bool) -> None:
    batch = maps(seed, 4, holes=True)
    e, v = batch["error"] ** 2, batch["uncertainty"] ** 2
    edges = equal_mass_edges(v, 7) if mass else equal_width_edges(0, float(v.max()), 7)
    fold = variance_bins(edges)
    whole = fold.update(fold.init(), {"squared_error": e, "variance": v})
    parts = [{"squared_error": e[s], "variance": v[s]} for s in (slice(cut), slice(cut, None))]
    a, b = (fold.update(fold.init(), p) for p in parts)
    for other in (fold.merge(a, b), fold.merge(b, a), run(fold, parts)):
        np.testing.assert_array_equal(other.count, whole.count)
        assert other.uce == pytest.approx(whole.uce, rel=1e-12)
    assert whole.n == np.isfinite(e).sum()
    filled = whole.count > 0
    gaps = np.abs(whole.mean_squared_error - whole.mean_variance)[filled]
    assert (gaps @ whole.count[filled]) / whole.n == pytest.approx(whole.uce)
    if mass and not np.isnan(e).any():
        assert np.ptp(whole.count) <= 2


@modest
@given(st.integers(0, 1000), st.booleans(), st.booleans())
def test_correlations_are_those_of_scipy(seed: int, ties: bool, holes: bool) -> None:
    batch = maps(seed, ties=ties, holes=holes)
    known = ~np.isnan(batch["error"])
    e, u = (x[known].astype(float) for x in batch.values())
    assert pearson(**batch) == pytest.approx(stats.pearsonr(e, u)[0], abs=1e-12)
    assert spearman(**batch) == pytest.approx(stats.spearmanr(e, u)[0], abs=1e-12)
    columns = image_correlations(**batch)
    for i, (x, y, k) in enumerate(zip(*batch.values(), known, strict=True)):
        assert columns["pearson"][i] == pytest.approx(stats.pearsonr(x[k], y[k])[0], abs=1e-6)
        assert columns["spearman"][i] == pytest.approx(stats.spearmanr(x[k], y[k])[0], abs=1e-9)


@modest
@given(st.integers(0, 1000), st.integers(0, 4), st.sampled_from([0.0, 1e8]))
def test_pooled_moments_of_batches_are_those_of_all(seed: int, cut: int, far: float) -> None:
    batch = {k: v.astype(float) + far for k, v in maps(seed, 4, holes=True).items()}
    parts = [{k: v[s] for k, v in batch.items()} for s in (slice(cut), slice(cut, None))]
    a, b = (pooled_moments.update(pooled_moments.init(), p) for p in parts)
    want = pearson(**batch)
    assert merge(a, b).pearson == pytest.approx(want, abs=1e-7 if far else 1e-12)
    assert merge(b, a).pearson == pytest.approx(want, abs=1e-7 if far else 1e-12)
    assert run(pooled_moments, parts).n == np.isfinite(batch["error"]).sum()


def test_a_constant_map_has_no_correlation() -> None:
    batch = maps(0)
    for value in (0.1, 0.0, 1e-30):
        flat = batch | {"uncertainty": np.full_like(batch["uncertainty"], value)}
        assert np.isnan(pearson(**flat)) and np.isnan(spearman(**flat))
    nothing = {k: np.full_like(v, np.nan) for k, v in batch.items()}
    assert np.isnan(pearson(**nothing)) and np.isnan(spearman(**nothing))


def segmented(seed: int, n: int, classes: int) -> dict[str, np.ndarray]:
    """n images of 4×3 pixels: float32 probabilities n×C×4×3 and labels, -1 here and there."""
    rng = np.random.default_rng(seed)
    probs = np.moveaxis(rng.dirichlet(np.full(classes, 0.4), (n, 4, 3)), -1, 1)
    y = rng.integers(-1, classes, (n, 4, 3))
    return {"probs": probs.astype(np.float32), "y": y}


@modest
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(2, 5))
def test_per_class_error_is_its_definition(seed: int, n: int, classes: int) -> None:
    batch = segmented(seed, n, classes)
    known = batch["y"] >= 0
    got = per_class_ece(**batch)
    for c in range(classes):
        p = batch["probs"][:, c][known].astype(float)
        own = batch["y"][known] == c
        want = 0.0
        for b in range(N_BINS):
            inside = [j for j in range(len(p)) if b / N_BINS < p[j] <= (b + 1) / N_BINS]
            inside += [j for j in range(len(p)) if b == 0 and p[j] == 0]
            if inside:
                want += len(inside) / len(p) * abs(np.mean(own[inside]) - np.mean(p[inside]))
        assert got[c] == pytest.approx(want, abs=1e-9)
    last = np.moveaxis(batch["probs"], 1, -1)
    np.testing.assert_array_equal(per_class_ece(last, batch["y"], axis=-1), got)
    rows = last.reshape(-1, classes)
    np.testing.assert_allclose(per_class_ece(rows, batch["y"].ravel()), got, atol=1e-12)
    wide = batch["probs"].astype(np.float64)
    np.testing.assert_allclose(per_class_ece(wide, batch["y"]), got, atol=1e-12)


@modest
@given(st.integers(0, 1000), st.integers(0, 4))
def test_class_bins_of_batches_are_those_of_all(seed: int, cut: int) -> None:
    batch = segmented(seed, 4, 3)
    fold = class_bins(3)
    parts = [{k: v[s] for k, v in batch.items()} for s in (slice(cut), slice(cut, None))]
    whole = fold.update(fold.init(), batch)
    a, b = (fold.update(fold.init(), p) for p in parts)
    for other in (fold.merge(a, b), fold.merge(b, a), run(fold, parts)):
        np.testing.assert_array_equal(other.count, whole.count)
        np.testing.assert_array_equal(other.hits, whole.hits)
        np.testing.assert_allclose(other.per_class, whole.per_class, rtol=1e-12)
    assert whole.n == (batch["y"] >= 0).sum()
    assert whole.static == pytest.approx(whole.per_class.mean())


def test_class_bins_are_the_shared_ones_at_every_edge() -> None:
    edges = np.arange(N_BINS + 1, dtype=np.float32) / np.float32(N_BINS)
    p = np.concatenate([edges, np.nextafter(edges, np.float32(2)), np.nextafter(edges, -1)])
    p = p.astype(np.float32)[(p >= 0) & (p <= 1.000001)]
    fold = class_bins(1)
    for x in p:
        batch = {"probs": np.array([[x]]), "y": np.zeros(1, int)}
        count = fold.update(fold.init(), batch).count[0]
        assert np.flatnonzero(count).tolist() == bin_index(np.array([x])).tolist()


def test_a_rare_class_shows_its_own_error() -> None:
    rng = np.random.default_rng(0)
    rare = np.where(rng.random(20_000) < 0.05, 0.5, 0.01)
    probs = np.stack([1 - rare, rare], axis=1)
    honest = (rng.random(20_000) < rare).astype(int)
    assert per_class_ece(probs, honest).max() < 0.005
    missing = np.zeros(20_000, int)  # never the rare class, whatever is claimed
    np.testing.assert_allclose(per_class_ece(probs, missing), rare.mean(), rtol=1e-9)


def test_image_columns_keep_their_images_together() -> None:
    first = {"a": np.array([1.0, 2.0]), "b": np.array([3.0, np.nan])}
    second = {"a": np.array([4.0]), "b": np.array([5.0])}
    table = run(image_figures, [first, second])
    np.testing.assert_array_equal(table["a"], [1, 2, 4])
    np.testing.assert_array_equal(table["b"], [3, np.nan, 5])
    empty = image_figures.init()
    merged = image_figures.merge(empty, image_figures.merge(table, empty))
    np.testing.assert_array_equal(merged["a"], table["a"])
    found = image_estimates(table)
    assert (found["a"].mean.value, found["a"].images) == (pytest.approx(7 / 3), 3)
    assert (found["b"].mean.value, found["b"].images) == (4.0, 2)
    none = image_estimates({"c": np.full(3, np.nan)})["c"]
    assert none.images == 0 and np.isnan(none.mean.value)


def test_an_interval_over_images_covers_and_one_over_pixels_does_not() -> None:
    rng = np.random.default_rng(0)
    images, pixels, runs = 40, 100, 100
    true = 0.2
    by_image = by_pixel = 0
    for _ in range(runs):
        share = rng.beta(2, 8, images)
        scores = (rng.random((images, pixels)) < share[:, None]).astype(np.float32)
        found = share_uncovered(image_losses(scores, 0.5), 0.25, n_boot=200)
        by_image += found.mean.low <= true <= found.mean.high
        half = 1.96 * scores.std() / np.sqrt(scores.size)
        by_pixel += abs(scores.mean() - true) <= half
    assert by_image >= 87  # 95 % intervals: fewer has probability 0.001
    assert by_pixel <= 60


def test_the_spread_over_images_is_shown() -> None:
    losses = np.arange(101) / 100
    found = share_uncovered(losses, 0.9)
    assert found.images == 101
    assert found.mean.value == pytest.approx(0.5)
    assert found.above.value == pytest.approx(10 / 101)
    assert found.quantiles == pytest.approx((0.5, 0.9, 0.99))
    subjects = share_uncovered(losses, 0.9, groups=np.arange(101) // 50)
    assert subjects.mean.high - subjects.mean.low > 2 * (found.mean.high - found.mean.low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: pearson(m["error"], m["uncertainty"][0]), "error has shape"),
        (lambda m: pearson(m["error"], m["uncertainty"] * np.nan), "uncertainty is nan at a pixel"),
        (lambda m: spearman(m["error"] * np.inf, m["uncertainty"]), "error is inf at a pixel"),
        (lambda m: uncertainty_calibration_error(-m["error"], m["error"]), "lies below 0"),
        (lambda m: uncertainty_calibration_error(m["error"], -m["error"]), "lies below 0"),
        (lambda m: variance_bins(np.array([2.0, 1.0])), "one ascending row"),
        (lambda m: share_uncovered(np.array([1.5]), 0.1), "outside"),
        (lambda m: share_uncovered(np.array([]), 0.1), "at least one row"),
        (
            lambda m: variance_bins(np.ones(1)).merge(
                variance_bins(np.ones(1)).init(), variance_bins(np.zeros(1)).init()
            ),
            "different edges",
        ),
        (lambda m: per_class_ece(np.full((2, 3), 1.5), np.zeros(2, int)), "outside"),
        (lambda m: per_class_ece(np.full((2, 3), np.nan), np.zeros(2, int)), "outside"),
        (lambda m: per_class_ece(np.full((2, 3), 0.3), np.full(2, 3)), "indices below 3"),
        (lambda m: per_class_ece(np.full((2, 3), 0.3), np.zeros(2)), "labels are float64"),
        (lambda m: per_class_ece(np.full((2, 3), 0.3), np.zeros((2, 2), int)), "probs have shape"),
        (
            lambda m: image_figures.merge({"a": np.zeros(1)}, {"b": np.zeros(1)}),
            r"figures \['b'\] follow",
        ),
        (lambda m: image_estimates({"a": np.zeros(2)}, groups=np.zeros(3)), "groups has 3 images"),
    ],
)
def test_what_cannot_be_measured_is_named(call: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call(maps(0))
