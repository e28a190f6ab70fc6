"""LAC and RAPS against slow loops; their sets against the coverage that theory gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom, binom

from calibration.bundle import conformal_rank
from calibration.conformal import raps, saps
from calibration.conformal.intervals import (
    QUANTILE_LEVELS,
    quantile_factors,
    residual_scores,
    signed_residuals,
)
from calibration.conformal.scores import METHODS, choose, class_scores, emit_class_scores, nearest
from posthoc.contract import FitError
from posthoc.graph import Fragment, standalone
from posthoc.links import softmax
from posthoc.runtime import open_session


def probs(n: int, c: int, seed: int, sharp: float = 2.0) -> np.ndarray:
    return softmax(np.random.default_rng(seed).normal(size=(n, c)) * sharp)


SETTINGS: dict[str, dict[str, Any]] = {
    "lac": {},
    "aps": {},
    "raps": {"k_reg": 2, "penalty": 0.1},
    "saps": {"weight": 0.2},
    "topk": {},
}
every = pytest.mark.parametrize("method", METHODS)


def defined(method: str, row: np.ndarray, c: int, u: float) -> float:
    """The papers' formulas for class ``c`` of one row."""
    order = sorted(range(len(row)), key=lambda j: (-row[j], j))
    rank = order.index(c) + 1
    above = sum(row[j] for j in order[: rank - 1])
    if method == "lac":
        return 1 - row[c]
    if method in ("aps", "raps"):
        more = 0.1 * max(0, rank - 2) if method == "raps" else 0.0
        return above + u * row[c] + more
    if method == "saps":
        largest = row[order[0]]
        return u * largest if rank == 1 else largest + 0.2 * (rank - 2 + u)
    return rank - 1 + u


SHIFT = {"aps": 1.0, "raps": 1.0, "saps": 1.0}  # scores are these less one


@st.composite
def simplex(draw: st.DrawFn) -> np.ndarray:
    """Rows of probabilities with zeros, ones and ties."""
    c = draw(st.integers(2, 7))
    parts = draw(
        st.lists(
            st.lists(st.integers(0, 4), min_size=c, max_size=c).filter(any), min_size=1, max_size=4
        )
    )
    p = np.asarray(parts, np.float64)
    return p / p.sum(1, keepdims=True)


@every
@settings(deadline=None, derandomize=True, max_examples=60)
@given(simplex(), st.floats(0, 1))
def test_a_score_is_its_definition(method: str, p: np.ndarray, u: float) -> None:
    got = class_scores(method, SETTINGS[method], p, u)
    used = 1.0 if method == "lac" else u
    for i, row in enumerate(p):
        for c in range(len(row)):
            want = defined(method, row, c, used) - SHIFT.get(method, 0.0)
            assert got[i, c] == pytest.approx(want, abs=1e-12)


def compiled(method: str, classes: int, randomised: bool) -> Any:
    g = Fragment()
    p = g.input("p", "float32", ["N", classes])
    u = g.input("u", "float32", ["N"]) if randomised else None
    top = g.op("ArgMax", p, axis=1, keepdims=0)
    g.publish(emit_class_scores(g, method, SETTINGS[method], p, top, classes, u), "s")
    return open_session(standalone(g, {"s": ("float32", (-1, classes))}))


@every
@pytest.mark.parametrize("randomised", [False, True])
@pytest.mark.parametrize("classes", [2, 7, 1000])
def test_the_graph_is_the_definition(method: str, randomised: bool, classes: int) -> None:
    if randomised and not METHODS[method].RANDOMISES:
        return
    p = probs(40, classes, 5).astype(np.float32)
    p[0] = 1 / classes  # all of them tie, and keep the order of the classes
    p[1], p[1, -1] = 0, 1
    p[2, : classes // 2] = 0
    u = np.linspace(0, 1, 40).astype(np.float32)
    feed = {"p": p, "u": u} if randomised else {"p": p}
    (got,) = compiled(method, classes, randomised).run(None, feed)
    want = class_scores(method, SETTINGS[method], p, u if randomised else 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 if classes == 1000 else 2e-6)


@every
def test_a_set_of_one_more_rank_is_larger(method: str) -> None:
    """Scores rise with the rank, whatever u is, so that sets are the top of the order."""
    p = probs(300, 9, 1)
    for u in (0.0, 0.4, 1.0):
        s = class_scores(method, SETTINGS[method], p, u)
        ordered = np.take_along_axis(s, np.argsort(-p, axis=1, kind="stable"), 1)
        assert (np.diff(ordered, axis=1) >= -1e-12).all()
        assert (s >= class_scores(method, SETTINGS[method], p, 0.0) - 1e-12).all()


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].RANDOMISES])
def test_u_makes_coverage_exact(method: str) -> None:
    """A ranked score of few classes has jumps; with u the coverage of 400 draws is k / (n + 1)."""
    n, inside = 19, 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        p = softmax(rng.normal(size=(n + 1, 3)))
        y = (p.cumsum(1) > rng.uniform(size=(n + 1, 1))).argmax(1)
        u = rng.uniform(size=n + 1)
        s = class_scores(method, SETTINGS[method], p, u)[np.arange(n + 1), y]
        inside += s[n] <= np.sort(s[:n])[conformal_rank(n, 0.1) - 1]
    assert binom.ppf(0.0005, 400, 0.9) <= inside <= binom.ppf(0.9995, 400, 0.9)


def test_the_nearest_probability() -> None:
    p = np.asarray([[0.5, 0.2, 0.3], [0.4, 0.2, 0.4]])
    np.testing.assert_allclose(nearest(p), [[0.2, 0.1, 0.1], [0.0, 0.2, 0.0]], atol=1e-12)


@pytest.mark.parametrize("method", ["lac", "aps", "raps", "saps"])
def test_saturated_rows_do_not_tie(method: str) -> None:
    """Two rows whose top class is within 1e-9 of one keep their order in float32."""
    z = np.zeros((2, 3), np.float32)
    z[0, 0], z[1, 0] = 22.0, 25.0
    settings_ = {"k_reg": 1, "penalty": 0.0, "weight": 0.1}
    g = Fragment()
    p = g.op("Softmax", g.input("z", "float32", ["N", 3]), axis=-1)
    label = g.op("ArgMax", p, axis=1, keepdims=0)
    g.op("Identity", emit_class_scores(g, method, settings_, p, label, 3), out="s")
    session = open_session(standalone(g, {"s": ("float32", (-1, 3))}))
    s = session.run(None, {"z": z})[0][:, 0]
    assert s[1] != s[0]
    want = class_scores(method, settings_, softmax(z))[:, 0]
    np.testing.assert_allclose(s, want, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
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
        s = class_scores(method, SETTINGS[method], p, u)[np.arange(n + m), y]
        q = np.sort(s[:n])[k - 1]
        inside += low <= (s[n:] <= q).sum() <= high
    assert inside >= 194


def test_raps_settings_come_from_the_given_rows() -> None:
    p = probs(500, 8, 3, sharp=1.0)
    y = (p.cumsum(1) > np.random.default_rng(0).uniform(size=(500, 1))).argmax(1)
    found = choose("raps", p, y, 0.1)
    ranks = np.sort([(row > row[c]).sum() + 1 for row, c in zip(p, y, strict=True)])
    assert found["k_reg"] == ranks[int(np.ceil(0.9 * 499))]
    assert found["penalty"] in raps.PENALTIES

    def mean_size(weight: float) -> float:
        s = saps.score(p, {"weight": weight})
        q = np.sort(s[np.arange(500), y])[conformal_rank(500, 0.1) - 1]
        return float((s <= q).sum(1).mean())

    weight = choose("saps", p, y, 0.1)["weight"]
    assert mean_size(weight) == min(map(mean_size, saps.WEIGHTS))
    assert choose("lac", p, y, 0.1) == choose("aps", p, y, 0.1) == choose("topk", p, y, 0.1) == {}


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(FitError, match="unknown conformal method 'cqr'"):
        class_scores("cqr", {}, probs(2, 3, 0))


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
