"""Risk control against its definition in fractions, and its promises over simulated images."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import betabinom, binom

from calibration.bundle import conformal_rank, threshold_at
from calibration.conformal.risk import (
    control_risk,
    hoeffding_bentkus,
    image_losses,
    loss_budget,
    needed,
    sample_pixels,
)
from posthoc.contract import DataError
from posthoc.graph import Fragment, standalone
from posthoc.runtime import open_session

modest = settings(deadline=None, derandomize=True, max_examples=100)
ALPHAS = ("0.05", "0.1", "0.15", "0.2", "0.25", "0.3", "0.4", "0.5")


@st.composite
def scored_images(draw: Any, weighted: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """A few images of a few pixels with many ties, missing pixels and, if wished, weights."""
    n, p = draw(st.integers(1, 25)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    scores = rng.integers(0, draw(st.integers(1, 30)), (n, p)).astype(np.float32) / 7
    scores[rng.random((n, p)) < draw(st.sampled_from([0.0, 0.3]))] = np.nan
    scores[0, 0] = 1.0
    weights = rng.integers(0, 3, (n, p)).astype(float) if weighted else None
    if weights is not None:
        weights[0, 0] = 1.0
    return scores, weights


def exact_loss(row: np.ndarray, weight: np.ndarray, threshold: float) -> Fraction:
    """One image's loss, pixel by pixel."""
    there = [(s, Fraction(w)) for s, w in zip(row, weight, strict=True) if not np.isnan(s)]
    total = sum((w for _, w in there), Fraction(0))
    missed = sum((w for s, w in there if s > threshold), Fraction(0))
    return missed / total if total else Fraction(0)


@modest
@given(st.booleans().flatmap(scored_images), st.sampled_from(ALPHAS))
def test_the_threshold_is_the_smallest_score_that_keeps_the_inequality(
    images: tuple[np.ndarray, np.ndarray | None], alpha: str
) -> None:
    scores, weights = images
    w = np.ones(scores.shape) if weights is None else weights
    n, level = len(scores), Fraction(alpha)

    def kept(threshold: float) -> bool:
        losses = [exact_loss(s, v, threshold) for s, v in zip(scores, w, strict=True)]
        risk = sum(losses, Fraction(0)) / n
        return Fraction(n, n + 1) * risk + Fraction(1, n + 1) <= level

    counted = sorted(
        {float(s) for s, v in zip(scores.flat, w.flat, strict=True) if v > 0 and s == s}
    )
    want = next((s for s in counted if kept(s)), math.inf) if kept(math.inf) else math.inf
    (promise,) = control_risk(scores, [float(alpha)], weights=weights)
    assert promise.threshold == want
    assert (want < math.inf) == (n >= promise.n_needed)
    # No threshold at all, on or off the scores, is admissible below it, save below all of them.
    if counted[0] < want < math.inf:
        assert not kept(float(np.nextafter(np.float32(want), np.float32(-1))))
    losses = [exact_loss(s, v, want) for s, v in zip(scores, w, strict=True)]
    assert promise.risk == pytest.approx(float(sum(losses, Fraction(0)) / n), abs=1e-12)
    assert promise.counted == sum(
        any(v > 0 and s == s for s, v in zip(*r, strict=True)) for r in zip(scores, w, strict=True)
    )


@modest
@given(st.integers(1, 120), st.sampled_from(ALPHAS), st.integers(0, 1000))
def test_images_of_one_pixel_give_the_conformal_rank(n: int, alpha: str, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=n).astype(np.float32)
    (promise,) = control_risk(scores[:, None], [float(alpha)])
    assert promise.threshold == threshold_at(np.sort(scores), float(alpha))


@modest
@given(st.booleans().flatmap(scored_images), st.sampled_from([None, 0.1]))
def test_a_higher_level_never_needs_a_higher_threshold(
    images: tuple[np.ndarray, np.ndarray | None], delta: float | None
) -> None:
    scores, weights = images
    levels = [0.02 * i for i in range(1, 45)]
    promises = control_risk(scores, levels, weights=weights, delta=delta)
    thresholds = [p.threshold for p in promises]
    assert thresholds == sorted(thresholds, reverse=True)


@pytest.mark.parametrize(
    ("alpha", "delta", "n"),
    [(0.1, None, 9), (0.05, None, 19), (0.01, None, 99), (0.05, 0.05, 59), (0.1, 0.1, 22)],
)
def test_needed_is_where_the_threshold_becomes_finite(
    alpha: float, delta: float | None, n: int
) -> None:
    assert needed(alpha, delta) == n
    scores = np.linspace(0, 1, 3 * n, dtype=np.float32).reshape(n, 3)
    (enough,) = control_risk(scores, [alpha], delta=delta)
    (few,) = control_risk(scores[1:], [alpha], delta=delta)
    assert enough.threshold == 1.0 and few.threshold == math.inf
    assert few.risk == 0.0 and few.n_needed == n
    assert loss_budget(n - 1, alpha, delta) < 0 <= loss_budget(n, alpha, delta)


def test_equal_weights_are_no_weights() -> None:
    scores = np.random.default_rng(0).normal(size=(400, 300)).astype(np.float32)
    levels = [0.01, 0.1, 0.3]
    assert control_risk(scores, levels) == control_risk(
        scores, levels, weights=np.full(scores.shape, 0.25)
    )


def test_where_the_empty_mask_is_good_enough_the_smallest_score_is_taken() -> None:
    scores = np.full((100, 2), np.nan, np.float32)
    scores[0] = [0.5, 0.25]  # one image of a hundred has the object
    (promise,) = control_risk(scores, [0.1])
    assert (promise.threshold, promise.counted) == (0.25, 1)


def test_infinite_scores_are_covered_by_infinity_only() -> None:
    scores = np.full((9, 2), np.inf, np.float32)
    (promise,) = control_risk(scores, [0.5])
    assert promise.threshold == math.inf and promise.risk == 0.0


def test_a_float32_graph_covers_exactly_the_pixels_counted_here() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((60, 50), dtype=np.float32)
    (promise,) = control_risk(scores, [0.1])
    g = Fragment()
    s, q = g.input("s", "float32", ["N", "P"]), g.input("q", "float32", [1])
    g.op("LessOrEqual", s, q, out="covered")
    session = open_session(standalone(g, {"covered": ("bool", (-1, -1))}))
    q_hat = np.array([promise.threshold], np.float32)
    covered = session.run(None, {"s": scores, "q": q_hat})[0]
    np.testing.assert_allclose(1 - covered.mean(axis=1), image_losses(scores, promise.threshold))
    assert (1 - covered.mean(axis=1)).mean() == pytest.approx(promise.risk)


# Images of very different difficulty: a pixel's score is |N(0, difficulty²)|, so the loss of a
# whole image at a threshold, over endlessly many pixels, is 2 Phi(-threshold / difficulty).


def difficulties(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.exp(0.8 * rng.standard_normal(n))


def pixels(rng: np.random.Generator, difficulty: np.ndarray, p: int) -> np.ndarray:
    return np.abs(rng.standard_normal((len(difficulty), p)) * difficulty[:, None]).astype(
        np.float32
    )


def whole_loss(threshold: float, difficulty: np.ndarray) -> np.ndarray:
    return 2 * ndtr(-threshold / difficulty)


def test_the_mean_loss_of_new_images_is_at_most_the_level_and_hardly_less() -> None:
    """Few sampled pixels of each image suffice for a promise about whole images."""
    n, p, alpha = 40, 25, 0.1
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(500):
        (promise,) = control_risk(pixels(rng, difficulties(rng, n), p), [alpha])
        losses.append(whole_loss(promise.threshold, difficulties(rng, 200)).mean())
    error = np.std(losses) / math.sqrt(500)
    assert np.mean(losses) <= alpha + 3 * error
    assert np.mean(losses) >= alpha - 1 / (n + 1) - 3 * error


def test_a_rank_among_pooled_pixels_breaks_its_promise() -> None:
    """What a pixel rank claims fails both on average, for few images, and in its spread."""
    n, p, alpha = 12, 100, 0.1
    rank = conformal_rank(n * p, alpha)
    low, high = betabinom(5000, rank, n * p + 1 - rank).ppf([0.005, 0.995])
    rng = np.random.default_rng(0)
    pooled, controlled, inside = [], [], 0
    for _ in range(500):
        scores = pixels(rng, difficulties(rng, n), p)
        threshold = float(np.sort(scores, axis=None)[rank - 1])
        new = difficulties(rng, 50)
        pooled.append(whole_loss(threshold, new).mean())
        inside += low <= (pixels(rng, new, 100) <= threshold).sum() <= high
        (promise,) = control_risk(scores, [alpha])
        controlled.append(whole_loss(promise.threshold, new).mean())
    assert inside < 250  # a valid rank has 495 of 500 inside
    assert np.mean(pooled) > alpha + 3 * np.std(pooled) / math.sqrt(500)
    assert np.mean(controlled) <= alpha + 3 * np.std(controlled) / math.sqrt(500)


def test_the_confident_promise_fails_in_few_calibrations() -> None:
    """Over 500 calibrations the true risk, known here, exceeds the level in few enough."""
    n, p, alpha, delta = 150, 10, 0.1, 0.1
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    population, weights = np.exp(0.8 * nodes), weights / weights.sum()
    rng = np.random.default_rng(0)
    risks = []
    for _ in range(500):
        (promise,) = control_risk(pixels(rng, difficulties(rng, n), p), [alpha], delta=delta)
        risks.append(float(weights @ whole_loss(promise.threshold, population)))
    assert sum(r > alpha for r in risks) <= binom.ppf(0.999, 500, delta)
    assert np.mean(risks) > alpha / 2


@pytest.mark.parametrize(("alpha", "delta"), [(0.1, 0.1), (0.2, 0.05), (0.5, 0.01)])
def test_the_confident_threshold_is_that_of_fixed_sequence_testing(
    alpha: float, delta: float
) -> None:
    rng = np.random.default_rng(1)
    scores = np.round(pixels(rng, difficulties(rng, 60), 8), 1)
    want = math.inf
    for t in np.unique(scores)[::-1]:  # from the largest down, until a test fails
        if hoeffding_bentkus(float(image_losses(scores, t).mean()), 60, alpha) > delta:
            break
        want = float(t)
    (promise,) = control_risk(scores, [alpha], delta=delta)
    assert promise.threshold == want < math.inf


@pytest.mark.parametrize("n", [5, 30, 200])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.6])
def test_the_p_value_of_a_true_null_is_no_smaller_than_uniform(n: int, alpha: float) -> None:
    """Exactly, for losses that are 0 or 1: P(p <= u) <= u at the edge of the null."""
    p = np.array([hoeffding_bentkus(k / n, n, alpha) for k in range(n + 1)])
    assert (np.diff(p) >= 0).all()
    below = binom.cdf(np.arange(n + 1), n, alpha)
    assert (below <= p + 1e-12).all()


@modest
@given(
    st.integers(1, 3000), st.sampled_from([0.01, 0.05, 0.1, 0.5]), st.sampled_from([0.01, 0.1, 0.3])
)
def test_the_budget_is_the_largest_mean_loss_that_passes(
    n: int, alpha: float, delta: float
) -> None:
    budget = loss_budget(n, alpha, delta)
    if budget < 0:
        assert hoeffding_bentkus(0.0, n, alpha) > delta
    else:
        assert hoeffding_bentkus(budget / n, n, alpha) <= delta * (1 + 1e-9)
        assert hoeffding_bentkus((budget + 1e-6) / n, n, alpha) > delta


def small_objects(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image of 400 pixels with an object of 4: its scores and where it is."""
    positive = np.zeros((20, 20), bool)
    positive[3:5, 7:9] = True
    scores = np.abs(rng.standard_normal((20, 20))) * difficulties(rng, 1)
    return scores.astype(np.float32), positive


def test_false_negatives_need_the_positives_sampled() -> None:
    """A uniform sample mostly holds no pixel of a small object, and its loss counts 0."""
    n, alpha, size = 30, 0.2, 100
    missed: dict[str, list[float]] = {"uniform": [], "positives": []}
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows, masks, positives = [], [], []
        for _ in range(n):
            scores, positive = small_objects(rng)
            places = rng.choice(400, size, replace=False)
            rows.append(scores.reshape(-1)[places])
            masks.append(positive.reshape(-1)[places])
            positives.append(sample_pixels(scores, 3, rng, counted=positive))
        (uniform,) = control_risk(np.stack(rows), [alpha], weights=np.stack(masks))
        (counted,) = control_risk(np.stack(positives), [alpha])
        new = difficulties(rng, 100)
        missed["uniform"].append(whole_loss(uniform.threshold, new).mean())
        missed["positives"].append(whole_loss(counted.threshold, new).mean())
    error = {k: np.std(v) / math.sqrt(300) for k, v in missed.items()}
    assert np.mean(missed["uniform"]) > alpha + 3 * error["uniform"]
    assert np.mean(missed["positives"]) <= alpha + 3 * error["positives"]
    assert np.mean(missed["positives"]) >= alpha - 1 / (n + 1) - 3 * error["positives"]


def test_a_sample_is_uniform_and_without_replacement() -> None:
    rng = np.random.default_rng(0)
    scores = np.arange(12, dtype=np.float32).reshape(3, 4)
    scores[1] = np.nan
    drawn = np.stack([sample_pixels(scores, 2, rng) for _ in range(4000)])
    assert (drawn[:, 0] != drawn[:, 1]).all()
    values, counts = np.unique(drawn, return_counts=True)
    np.testing.assert_array_equal(values, [0, 1, 2, 3, 8, 9, 10, 11])
    assert abs(counts - 1000).max() < 4 * math.sqrt(1000)
    counted = sample_pixels(scores, 3, rng, counted=scores == 9)
    np.testing.assert_array_equal(counted, np.array([9, np.nan, np.nan], np.float32))
    assert drawn.dtype == counted.dtype == np.float32


def test_what_cannot_be_controlled_is_named() -> None:
    scores = np.zeros((20, 2), np.float32)
    with pytest.raises(DataError, match="no image has a pixel that counts"):
        control_risk(scores, [0.1], weights=np.zeros((20, 2)))
    with pytest.raises(DataError, match="no image has a pixel that counts"):
        control_risk(np.empty((0, 2), np.float32), [0.1])
    with pytest.raises(DataError, match="n×P floats"):
        control_risk(scores[0], [0.1])
    with pytest.raises(DataError, match="n×P floats"):
        control_risk(scores.astype(int), [0.1])
    with pytest.raises(DataError, match=r"weights have shape \(2,\)"):
        control_risk(scores, [0.1], weights=np.ones(2))
    with pytest.raises(DataError, match="image 19: a weight is negative"):
        control_risk(scores, [0.1], weights=np.where(np.arange(40).reshape(20, 2) == 39, -1, 1))
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(DataError, match="alpha must lie strictly between"):
            control_risk(scores, [alpha])
    with pytest.raises(DataError, match="delta must lie strictly between"):
        control_risk(scores, [0.1], delta=1.0)
    with pytest.raises(DataError, match="counted has shape"):
        sample_pixels(scores, 1, np.random.default_rng(0), counted=np.ones(3))
