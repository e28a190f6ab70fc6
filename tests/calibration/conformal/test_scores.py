"""LAC and RAPS against slow loops; their sets against the coverage that theory gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom

from calibration.bundle import conformal_rank
from calibration.conformal.intervals import (
    QUANTILE_LEVELS,
    quantile_factors,
    residual_scores,
    signed_residuals,
)
from calibration.conformal.scores import choose_raps, class_scores, emit_class_scores, lac, raps
from posthoc.contract import FitError
from posthoc.graph import Fragment, standalone
from posthoc.links import softmax
from posthoc.runtime import open_session


def probs(n: int, c: int, seed: int, sharp: float = 2.0) -> np.ndarray:
    return softmax(np.random.default_rng(seed).normal(size=(n, c)) * sharp)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(1, 4), st.floats(0, 1))
def test_raps_is_its_definition_less_one(seed: int, c: int, k_reg: int, u: float) -> None:
    p = probs(3, c, seed)
    got = raps(p, k_reg=k_reg, penalty=0.1, u=u)
    for i, row in enumerate(p):
        order = sorted(range(c), key=lambda j: -row[j])
        for rank, j in enumerate(order, 1):
            above = sum(row[order[: rank - 1]])
            want = above + u * row[j] + 0.1 * max(0, rank - k_reg)
            assert got[i, j] == pytest.approx(want - 1, abs=1e-12)


def test_lac_is_one_minus_p() -> None:
    p = probs(50, 6, 0)
    np.testing.assert_allclose(lac(p), 1 - p, atol=1e-12)


@pytest.mark.parametrize("method", ["lac", "raps"])
def test_saturated_rows_do_not_tie(method: str) -> None:
    """Two rows whose top class is within 1e-9 of one keep their order in float32."""
    z = np.zeros((2, 3), np.float32)
    z[0, 0], z[1, 0] = 22.0, 25.0
    settings_ = {"k_reg": 1, "penalty": 0.0}
    g = Fragment()
    p = g.op("Softmax", g.input("z", "float32", ["N", 3]), axis=-1)
    label = g.op("ArgMax", p, axis=1, keepdims=0)
    g.op("Identity", emit_class_scores(g, method, settings_, p, label, 3), out="s")
    session = open_session(standalone(g, {"s": ("float32", (-1, 3))}))
    s = session.run(None, {"z": z})[0][:, 0]
    assert s[1] != s[0]
    want = class_scores(method, settings_, softmax(z))[:, 0]
    np.testing.assert_allclose(s, want, rtol=1e-5)


@pytest.mark.parametrize("method", ["lac", "raps"])
@pytest.mark.parametrize("alpha", [0.1, 0.05])
def test_coverage_lies_in_the_band(method: str, alpha: float) -> None:
    """Over 200 draws the counts of covered rows follow BetaBinomial(m, k, n+1-k)."""
    n, m, inside = 300, 300, 0
    k = conformal_rank(n, alpha)
    low, high = betabinom.ppf([0.005, 0.995], m, k, n + 1 - k)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        p = softmax(rng.normal(size=(n + m, 6)) * 2)
        y = (p.cumsum(1) > rng.uniform(size=(n + m, 1))).argmax(1)
        u = rng.uniform(size=n + m)
        settings_ = {"k_reg": 2, "penalty": 0.05}
        s = class_scores(method, settings_, p, u)[np.arange(n + m), y]
        q = np.sort(s[:n])[k - 1]
        inside += low <= (s[n:] <= q).sum() <= high
    assert inside >= 194


def test_raps_settings_come_from_the_given_rows() -> None:
    p = probs(500, 8, 3, sharp=1.0)
    y = (p.cumsum(1) > np.random.default_rng(0).uniform(size=(500, 1))).argmax(1)
    found = choose_raps(p, y, 0.1)
    ranks = np.sort([(row > row[c]).sum() + 1 for row, c in zip(p, y, strict=True)])
    assert found["k_reg"] == ranks[int(np.ceil(0.9 * 499))]
    assert found["penalty"] in (0.001, 0.01, 0.1, 0.2, 0.5)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(FitError, match="unknown conformal method 'aps'"):
        class_scores("aps", {}, probs(2, 3, 0))


def test_joint_intervals_cover_all_outputs_together() -> None:
    inside = 0
    n = m = 500
    k = conformal_rank(n, 0.1)
    low, high = betabinom.ppf([0.005, 0.995], m, k, n + 1 - k)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        std = rng.uniform(0.5, 2, (n + m, 3))
        y = rng.standard_t(4, size=std.shape) * std
        s = residual_scores(y, np.zeros_like(y), std)
        q = np.sort(s[:n])[k - 1]
        covered = (np.abs(y[n:]) <= q * std[n:]).all(1)
        inside += low <= covered.sum() <= high
    assert inside >= 96


def test_quantile_factors_are_order_statistics() -> None:
    rng = np.random.default_rng(0)
    signed = signed_residuals(rng.normal(size=(99, 2)), np.zeros((99, 2)), np.ones((99, 2)))
    factors = quantile_factors(signed)
    for k in range(2):
        ordered = sorted(signed[:, k])
        want = [ordered[int(np.ceil(round(100 * q, 9))) - 1] for q in QUANTILE_LEVELS]
        np.testing.assert_array_equal(factors[k], want)
    assert (np.diff(factors, axis=1) >= 0).all()
