"""p-values, the Neyman–Pearson rank and abstention against their definitions and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from calibration.threshold import (
    fit_abstention,
    neyman_pearson_rank,
    neyman_pearson_rows,
    pvalue_table,
    pvalues,
)
from posthoc.contract import DataError

floats = st.floats(-100, 100, allow_nan=False, width=32)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(floats, min_size=1, max_size=60), st.lists(floats, min_size=1, max_size=20))
def test_pvalues_are_their_definition(reference: list[float], scores: list[float]) -> None:
    table, p = pvalue_table(np.asarray(reference))
    want = [(1 + sum(r >= s for r in reference)) / (len(reference) + 1) for s in scores]
    np.testing.assert_allclose(pvalues(table, p, np.asarray(scores)), want, rtol=1e-12)


def test_a_thinned_table_is_conservative_and_exact_in_the_tail() -> None:
    rng = np.random.default_rng(0)
    reference, scores = rng.normal(size=20_000), rng.normal(size=500)
    table, p = pvalue_table(reference)
    assert len(table) <= 1024
    exact = np.asarray([(1 + (reference >= s).sum()) / 20_001 for s in scores])
    got = pvalues(table, p, scores)
    assert (got >= exact - 1e-15).all()
    assert (got - exact).max() < 0.002
    tail = exact < 500 / 20_001
    np.testing.assert_array_equal(got[tail], exact[tail])


@pytest.mark.parametrize(("alpha", "delta"), [(0.05, 0.05), (0.1, 0.05), (0.05, 0.01)])
@pytest.mark.parametrize("n", [59, 60, 100, 500, 2000])
def test_the_rank_is_the_smallest_that_keeps_the_promise(
    alpha: float, delta: float, n: int
) -> None:
    by_hand = next((k for k in range(1, n + 1) if binom.sf(k - 1, n, 1 - alpha) <= delta), None)
    assert neyman_pearson_rank(n, alpha, delta) == by_hand
    if by_hand is not None:
        # The false-alarm rate of flagging above the k-th of n is Beta(n+1-k, k).
        assert beta.sf(alpha, n + 1 - by_hand, by_hand) <= delta + 1e-9


def test_fifty_nine_rows_are_the_fewest() -> None:
    assert neyman_pearson_rows(0.05, 0.05) == 59
    assert neyman_pearson_rank(59, 0.05, 0.05) == 59
    assert neyman_pearson_rank(58, 0.05, 0.05) is None


@pytest.mark.parametrize("known", [False, True])
def test_abstention_keeps_its_promise(known: bool) -> None:
    """Over 500 calibrations, the true error of what is answered exceeds the level in at most the
    99.9 % quantile of Binomial(500, delta) of them."""
    level, delta, exceeded, answered = 0.1, 0.1, 0, []
    rng = np.random.default_rng(0)
    for _ in range(500):
        grid = rng.uniform(size=300)
        failed = rng.uniform(size=300) > grid if known else None
        sure = rng.uniform(size=600)
        wrong = rng.uniform(size=600) > sure  # right with probability = confidence
        found = fit_abstention(grid, sure, wrong, level, delta, grid_wrong=failed)
        if found.threshold is not None:
            # E[1 - c | c > t] for c uniform.
            exceeded += (1 - max(found.threshold, 0)) / 2 > level
            answered.append(found.answered)
    assert exceeded <= binom.ppf(0.999, 500, delta)
    assert np.mean(answered) > 0.05  # not by answering nothing: a fifth could be


def test_a_start_from_labelled_rows_answers_more() -> None:
    """Confidence that stops short of certainty: at the strict end one wrong answer is a failure."""
    strict, started, exceeded = [], [], 0
    rng = np.random.default_rng(0)
    for _ in range(300):
        grid, sure = rng.uniform(size=1000), rng.uniform(size=1000)
        failed, wrong = (rng.uniform(size=1000) > 0.8 + 0.17 * c for c in (grid, sure))
        strict.append(fit_abstention(grid, sure, wrong, 0.1, 0.05).answered)
        found = fit_abstention(grid, sure, wrong, 0.1, 0.05, grid_wrong=failed)
        started.append(found.answered)
        if found.threshold is not None:
            exceeded += 0.2 - 0.17 * (1 + max(found.threshold, 0)) / 2 > 0.1
    assert np.mean(started) > 1.5 * np.mean(strict)
    assert exceeded <= binom.ppf(0.999, 300, 0.05)


def test_a_second_start_costs_half_of_delta_at_most() -> None:
    """Surest answers are right: what the strict end shows at delta / 2 stays shown at delta."""
    passed, more = 0, 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        grid, sure = rng.uniform(size=300), rng.uniform(size=400)
        failed, wrong = (rng.uniform(size=len(c)) > c for c in (grid, sure))
        halved = fit_abstention(grid, sure, wrong, 0.1, 0.05)
        found = fit_abstention(grid, sure, wrong, 0.1, 0.1, grid_wrong=failed)
        assert found.answered >= halved.answered
        passed += halved.threshold is not None
        more += found.answered > halved.answered
    assert min(passed, more) > 20


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.3]), st.sampled_from([0.1, 0.4]))
def test_two_starts_are_a_fallback_procedure_by_loops(
    seed: int, level: float, delta: float
) -> None:
    """Wiens 2003: what one hypothesis does not lose is passed on to the next in order."""
    rng = np.random.default_rng(seed)
    grid, sure = (rng.integers(0, 8, n) / 8 for n in rng.integers(1, 90, 2))
    failed, wrong = (rng.uniform(size=len(c)) > 0.6 + 0.4 * c for c in (grid, sure))
    tried = [*sorted(np.unique(np.quantile(grid, np.linspace(0, 1, 101))))[::-1], -1.0]
    tails = [
        binom.cdf(
            sum(w for c, w in zip(grid, failed, strict=True) if c > t), (grid > t).sum(), level
        )
        for t in tried
    ]
    second = int(np.argmin(tails))
    weights = np.zeros(len(tried))
    weights[0] += delta / 2
    weights[second] += delta / 2
    carried, want = 0.0, None
    for t, weight in zip(tried, weights, strict=True):
        carried += weight
        answered = [bool(w) for c, w in zip(sure, wrong, strict=True) if c > t]
        if not carried or (1 - level) ** len(answered) > carried:
            continue  # nothing that could be seen would show it
        if binom.cdf(sum(answered), len(answered), level) > carried:
            carried = 0.0
        else:
            want = float(t)
    found = fit_abstention(grid, sure, wrong, level, delta, grid_wrong=failed)
    assert found.threshold == want


def test_nothing_passes_means_abstain_on_all() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(size=500)
    found = fit_abstention(sure, sure, np.ones(500, bool), 0.05, 0.05)
    assert (found.threshold, found.answered) == (None, 0.0)
    few = fit_abstention(sure, sure[:58], np.zeros(58, bool), 0.05, 0.05)
    assert few.threshold is None
    enough = fit_abstention(sure, sure[:59], np.zeros(59, bool), 0.05, 0.05)
    assert enough.answered == 1.0 and not math.isinf(enough.threshold or 0)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.3]), st.sampled_from([0.1, 0.4]))
def test_abstention_is_a_fixed_sequence_by_loops(seed: int, level: float, delta: float) -> None:
    rng = np.random.default_rng(seed)
    grid, sure = (rng.integers(0, 8, n) / 8 for n in rng.integers(1, 60, 2))
    wrong = rng.uniform(size=len(sure)) > sure
    want = None
    for t in [*sorted(np.unique(np.quantile(grid, np.linspace(0, 1, 101))))[::-1], -1.0]:
        answered = [bool(w) for c, w in zip(sure, wrong, strict=True) if c > t]
        if (1 - level) ** len(answered) > delta:
            continue  # too few rows to show anything
        if binom.cdf(sum(answered), len(answered), level) > delta:
            break
        want = float(t)
    found = fit_abstention(grid, sure, wrong, level, delta)
    assert found.threshold == want
    assert found.answered == (0.0 if want is None else (sure > want).mean())


def test_abstention_refuses_what_it_cannot_rank() -> None:
    rows, right = np.linspace(0, 1, 80), np.zeros(80, bool)
    for level in (0.0, 1.0, 1.5, math.nan):
        with pytest.raises(DataError, match="max_error must lie strictly between"):
            fit_abstention(rows, rows, right, level, 0.1)
        with pytest.raises(DataError, match="delta must lie strictly between"):
            fit_abstention(rows, rows, right, 0.1, level)
    with pytest.raises(DataError, match="80 confidences and 79 answers"):
        fit_abstention(rows, rows, right[1:], 0.1, 0.1)
    with pytest.raises(DataError, match="80 confidences and 79 answers"):
        fit_abstention(rows, rows, right, 0.1, 0.1, grid_wrong=right[1:])
    hole = np.where(np.arange(80) == 5, np.nan, rows)
    for pair in ((hole, rows), (rows, hole)):
        with pytest.raises(DataError, match="row 5: its confidence is NaN"):
            fit_abstention(*pair, right, 0.1, 0.1)
    with pytest.raises(DataError, match="there are none"):
        fit_abstention(rows[:0], rows, right, 0.1, 0.1)
    assert fit_abstention(rows, rows[:0], right[:0], 0.1, 0.1).threshold is None
    assert fit_abstention(rows[:1], rows[:1], right[:1], 0.1, 0.1).threshold is None
