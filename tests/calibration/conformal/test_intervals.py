"""Intervals: a row is inside exactly where its score is at most q, and as often as promised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from calibration.bundle import conformal_rank
from calibration.conformal.intervals import (
    INTERVALS,
    Interval,
    bounds,
    emit_bounds,
    interval_scores,
    make,
)
from calibration.recalibration import Base, knots
from posthoc.contract import FitError
from posthoc.graph import Fragment, standalone
from posthoc.runtime import open_session

every = pytest.mark.parametrize("method", INTERVALS)
sides = pytest.mark.parametrize("side", ["two", "lower", "upper"])
BASE = Base()


def rows(n: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets with skewed errors, means and standard deviations, n×k each."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=(n, k)) * 3, rng.uniform(0.5, 2, (n, k))
    return mean + std * (rng.gamma(2.0, size=(n, k)) - 2), mean, std


def interval(method: str, side: Any, k: int = 2) -> Interval:
    y, mean, std = rows(700, k, 100)
    return make(method, side, np.full(k, 1.5), 1.2, knots(BASE, (y - mean) / std))


@every
@sides
def test_inside_is_a_score_of_at_most_q(method: str, side: Any) -> None:
    y, mean, std = rows(400, 2, 0)
    made = interval(method, side)
    score = interval_scores(made, y, mean, std)
    for q in (0.05, 0.3, 0.45, 2.0, 30.0):
        lower, upper = bounds(made, np.full((400, 1), q), mean, std)
        assert (lower <= upper).all() and not np.isnan(lower).any()
        inside = ((y >= lower) & (y <= upper)).all(1)
        np.testing.assert_array_equal(inside, score <= q)
    lower, upper = bounds(made, np.full((1, 1), np.inf), mean, std)
    assert np.isneginf(lower).all() and np.isposinf(upper).all()
    ends = {"two": (True, True), "lower": (True, False), "upper": (False, True)}[side]
    lower, upper = bounds(made, np.full((1, 1), 0.3), mean, std)
    assert (np.isfinite(lower).all(), np.isfinite(upper).all()) == ends


@every
@sides
@pytest.mark.parametrize("opset", [13, 20])
def test_the_graph_is_the_definition(method: str, side: Any, opset: int) -> None:
    made = interval(method, side)
    _, mean, std = rows(60, 2, 1)
    q = np.concatenate(
        [np.linspace(-0.2 if method == "cqr" else 0, 0.6, 58), [5.0, np.inf]]
    ).astype(np.float32)[:, None]
    g = Fragment(opset)
    names = (
        g.input("q", "float32", ["N", 1]),
        *(g.input(n, "float32", ["N", 2]) for n in ("mean", "std")),
    )
    for tensor, out in zip(emit_bounds(made, g, *names), ("lower", "upper"), strict=True):
        g.publish(tensor, out)
    model = standalone(g, dict.fromkeys(("lower", "upper"), ("float32", (-1, 2))))
    mean, std = mean.astype("f4"), std.astype("f4")
    got = open_session(model).run(None, {"q": q, "mean": mean, "std": std})
    for have, want in zip(got, bounds(made, q, mean, std), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=2e-5)


@every
@sides
def test_coverage_is_the_rank(method: str, side: Any) -> None:
    """Over 400 draws of 29 rows a new one is covered with probability k / 30, however wrong the
    distribution is."""
    made, n, inside = interval(method, side), 29, 0
    k = conformal_rank(n, 0.2)
    for seed in range(400):
        y, mean, std = rows(n + 1, 2, 1000 + seed)
        score = interval_scores(made, y, mean, std)
        lower, upper = bounds(made, np.sort(score[:n])[k - 1][None, None], mean, std)
        inside += bool(((y >= lower) & (y <= upper))[n].all())
    assert binom.ppf(0.0005, 400, k / 30) <= inside <= binom.ppf(0.9995, 400, k / 30)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.sampled_from(INTERVALS), st.floats(0.1, 50), st.floats(-100, 100))
def test_another_unit_of_the_target_is_another_unit_of_the_interval(
    method: str, factor: float, shift: float
) -> None:
    y, mean, std = rows(50, 1, 3)
    plain = interval(method, "two", 1)
    scaled = {k: v * factor if k == "scale" else v for k, v in plain.tensors.items()}
    other = Interval(plain.method, plain.side, plain.margin, scaled)
    moved = (factor * y + shift, factor * mean + shift, factor * std)
    np.testing.assert_allclose(
        interval_scores(other, *moved), interval_scores(plain, y, mean, std), rtol=1e-6, atol=1e-8
    )
    q = np.full((1, 1), 0.3)
    for a, b in zip(bounds(other, q, *moved[1:]), bounds(plain, q, mean, std), strict=True):
        np.testing.assert_allclose(a, factor * b + shift, rtol=1e-6, atol=1e-6)


def test_a_skewed_error_has_a_skewed_interval() -> None:
    y, mean, std = rows(5000, 1, 4)
    missed = {}
    for method in ("residual", "cdf"):
        made = interval(method, "two", 1)
        q = np.sort(interval_scores(made, y, mean, std))[conformal_rank(5000, 0.1) - 1]
        lower, upper = bounds(made, q[None, None], mean, std)
        missed[method] = (y < lower).mean(), (y > upper).mean()
    assert all(abs(share - 0.05) < 0.02 for share in missed["cdf"])
    assert missed["residual"][0] < 0.01  # all of its misses are above


def test_cqr_is_its_definition_and_never_less_than_nothing() -> None:
    y, mean, std = rows(200, 1, 5)
    a = float(norm.ppf(0.95))
    made = make("cqr", "two", np.ones(1), a)
    low, high = mean - a * std, mean + a * std
    want = np.maximum(low - y, y - high)[:, 0]
    np.testing.assert_allclose(interval_scores(made, y, mean, std), want)
    lower, upper = bounds(made, np.full((1, 1), -100.0), mean, std)
    np.testing.assert_array_equal(lower, upper)
    with pytest.raises(FitError, match="unknown interval 'aps'"):
        make("aps", "two", np.ones(1), a)
