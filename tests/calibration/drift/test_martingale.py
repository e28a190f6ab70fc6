"""Conformal test martingales against slow definitions, and their promises by simulation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from calibration.drift import martingale
from calibration.drift.martingale import Martingale, from_json, run, start, to_json
from posthoc.contract import DataError

STREAMS = 2000
Draw = Callable[[np.random.Generator, int], np.ndarray]
KINDS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "five values": lambda rng, n: rng.integers(0, 5, n).astype(float),
    "nine of ten are 0": lambda rng, n: np.where(rng.random(n) < 0.9, 0.0, rng.random(n)),
    "constant": lambda rng, n: np.ones(n),
}


def slow_pvalues(reference: np.ndarray, scores: np.ndarray, seed: int) -> list[float]:
    """Scores as pairs with a random number, all of them kept: which lie between which edges?"""
    uniform = [np.random.Generator(np.random.Philox(key=[seed, k])) for k in (0, 1)]
    pairs = sorted(zip(reference.tolist(), uniform[1].random(len(reference)), strict=True))
    n = len(pairs)
    bins = min(64, n + 1)
    ranks = [round(j * (n + 1) / bins) for j in range(1, bins)]
    edges = [pairs[r - 1] for r in ranks]
    first, after = [-math.inf, *edges], [*edges, (math.inf, math.inf)]
    gaps = [b - a for a, b in zip([0, *ranks], [*ranks, n + 1], strict=True)]
    seen: list[tuple[float, float]] = []
    found = []
    for x in scores.tolist():
        pair, u = (x, uniform[0].random()), uniform[0].random()
        here = sum(e <= pair for e in edges)
        low, high = first[here], after[here]
        below = sum(gaps[:here]) + (sum(s < low for s in seen) if here else 0)  # type: ignore[operator]
        inside = gaps[here] + sum((not here or s >= low) and s < high for s in seen)  # type: ignore[operator]
        found.append((below + u * inside) / (n + 1 + len(seen)))
        seen.append(pair)
    return found


def slow_log10(p: np.ndarray, rates: tuple[float, ...]) -> np.ndarray:
    """Mean of simple jumpers in extended precision, without scaling."""
    path = np.zeros(len(p), np.longdouble)
    for q in (p, np.abs(2 * p - 1)):
        for rate in (*rates, None):
            capital = {e: np.longdouble(1) / 3 for e in (-1, 0, 1)}
            for t, value in enumerate(q):
                r = np.longdouble(1 / (t + 2) if rate is None else rate)
                whole = sum(capital.values())
                for e in capital:
                    bet = 1 + e * (np.longdouble(value) - np.longdouble(0.5))
                    capital[e] = ((1 - r) * capital[e] + r * whole / 3) * bet
                path[t] += sum(capital.values())
    return np.log10(path / (2 * len(rates) + 2))


def alarm_rates(streams: list[Martingale]) -> dict[float, float]:
    return {a: float(np.mean([s.alarm(a) for s in streams])) for a in (0.05, 0.01)}


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 150),
    length=st.integers(0, 60),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_pvalues_equal_the_slow_definition(seed: int, n: int, length: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    reference, scores = KINDS[kind](rng, n), KINDS[kind](rng, length)
    p, counts = martingale.pvalues(start(reference, seed=seed), scores)
    np.testing.assert_allclose(p, slow_pvalues(reference, scores, seed), atol=1e-14)
    assert counts.sum() == n + 1 + length


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_capital_is_that_of_the_jumpers(drift: float) -> None:
    p = np.clip(np.random.default_rng(0).random(400) + drift, 0, 1)
    _, path = martingale.bet(start(np.arange(9.0)), p)
    np.testing.assert_allclose(path, slow_log10(p, martingale.RATES).astype(float), atol=1e-9)


def test_no_capital_is_too_large_or_too_small_for_a_float() -> None:
    p = np.concatenate([np.full(3000, 0.97), np.tile([0.05, 0.5], 300)])
    state, path = martingale.bet(start(np.arange(9.0), rates=(0.1,)), p)
    assert path.max() > 450
    np.testing.assert_allclose(path, slow_log10(p, (0.1,)).astype(float), rtol=1e-9)
    assert state.log10_peak == path.max() and state.log10_capital == path[-1]
    assert from_json(to_json(state)) == state
    fresh = start(np.arange(9.0), rates=(0.1,))
    small = tuple((a * 2.0**-300, b * 2.0**-300, c * 2.0**-300) for a, b, c in fresh.accounts)
    poor, other = martingale.bet(replace(fresh, accounts=small), p)
    np.testing.assert_allclose(other, path - 300 * math.log10(2), rtol=1e-9)
    assert poor.log10_peak == other.max()


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 1500), max_size=4),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_pieces_and_restarts_change_no_bit(seed: int, cuts: list[int], kind: str) -> None:
    rng = np.random.default_rng(seed)
    state = start(KINDS[kind](rng, 100), seed=seed)
    scores = KINDS[kind](rng, 1500) + 0.5
    whole, path = run(state, scores)
    parts = []
    for piece in np.split(scores, sorted(cuts)):
        state, more = run(from_json(to_json(state)), piece)
        parts.append(more)
    assert state == whole
    np.testing.assert_array_equal(np.concatenate(parts), path)


def test_steps_of_one_are_the_run() -> None:
    rng = np.random.default_rng(0)
    one = start(rng.normal(size=50))
    scores = rng.normal(size=200) + 1
    whole, path = run(one, scores)
    for i, x in enumerate(scores):
        one, log10 = run(one, np.asarray([x]))
        assert log10[0] == path[i] == one.log10_capital
        assert one.log10_peak == max(0.0, path[: i + 1].max())
    assert one == whole


def test_only_the_order_of_scores_counts() -> None:
    rng = np.random.default_rng(0)
    reference, scores = rng.normal(size=300), rng.normal(size=300)
    _, path = run(start(reference), scores)
    top = reference.max()
    for f in (np.exp, lambda x: 1e300 * x, lambda x: np.where(x >= top, np.inf, x)):
        _, other = run(start(f(reference)), f(scores))
        np.testing.assert_array_equal(other, path)


@pytest.mark.parametrize("kind", ["normal", "five values"])
def test_pvalues_are_uniform_and_independent(kind: str) -> None:
    """Exactly, though the edges are reference scores: of five of them, hence six bins."""
    p = np.empty((4000, 3))
    for seed in range(len(p)):
        x = KINDS[kind](np.random.default_rng(seed), 8)
        p[seed], _ = martingale.pvalues(start(x[:5], seed=seed), x[5:])
    cells = np.minimum((p * 5).astype(int), 4)
    fine = np.minimum((p * 48).astype(int), 47)
    for t in range(3):
        assert chisquare(np.bincount(fine[:, t], minlength=48)).pvalue > 0.001
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert chisquare(np.bincount(cells[:, a] * 5 + cells[:, b], minlength=25)).pvalue > 0.001


def test_capital_is_one_on_average() -> None:
    p = np.random.default_rng(0).random((4000, 8))
    state = start(np.arange(3.0), rates=(0.5,))
    capital = np.asarray([10 ** martingale.bet(state, row)[1] for row in p])
    error = capital.std(axis=0) / math.sqrt(len(p))
    assert (np.abs(capital.mean(axis=0) - 1) <= 3.5 * error + 1e-12).all()
    assert error[-1] < 0.02


@pytest.mark.parametrize(
    ("kind", "n"),
    [("normal", 200), ("normal", 10), ("five values", 200), ("nine of ten are 0", 60)],
)
def test_false_alarms_are_as_rare_as_promised(kind: str, n: int) -> None:
    """With a reference of its own for each stream."""
    found = []
    for seed in range(STREAMS):
        x = KINDS[kind](np.random.default_rng(seed), n + 300)
        found.append(run(start(x[:n], seed=seed), x[n:])[0])
    for nominal, rate in alarm_rates(found).items():
        assert rate <= nominal + 3 * math.sqrt(nominal * (1 - nominal) / STREAMS)
        assert rate > 0  # it is no test that never rejects


@pytest.mark.parametrize(
    ("change", "within"),
    [
        (lambda x: x + 1.0, 120),
        (lambda x: x - 1.0, 120),
        (lambda x: 2.5 * x, 250),
        (lambda x: 0.3 * x, 250),
    ],
    ids=["up", "down", "wider", "narrower"],
)
def test_a_change_is_found(change: Callable[[np.ndarray], np.ndarray], within: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        clean, _ = run(start(rng.normal(size=1000)), rng.normal(size=1000))
        after, _ = run(clean, change(rng.normal(size=within)))
        assert after.alarm(0.01)


def test_a_long_healthy_time_costs_little() -> None:
    rng = np.random.default_rng(0)
    state, path = run(start(rng.normal(size=1000)), rng.normal(size=60_000))
    assert path[-1] > -4.5  # a jumper at the rate 0.01 alone would have lost 10^-170
    state, _ = run(state, rng.normal(size=200) + 1)
    assert state.alarm(0.01)


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(DataError, match="there are none"):
        start(np.zeros(0))
    with pytest.raises(DataError, match="reference row 1: its score is NaN"):
        start(np.asarray([0, np.nan]))
    with pytest.raises(DataError, match="rates of jumpers"):
        start(np.zeros(3), rates=(0.0,))
    with pytest.raises(DataError, match="a seed lies"):
        start(np.zeros(3), seed=-1)
    state = start(np.zeros(3))
    with pytest.raises(DataError, match="row 2: its score is NaN"):
        run(state, np.asarray([0, 1, np.nan]))
    with pytest.raises(DataError, match="'martingale'"):
        from_json("{}")
    broken = {**json.loads(to_json(state)), "ties": []}
    with pytest.raises(DataError, match="do not match"):
        from_json(json.dumps(broken))
