"""The risk monitor against likelihood ratios of scipy, and its promises by simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest

from calibration.bundle import conformal_rank, threshold_at
from calibration.drift import risk_monitor
from calibration.drift.risk_monitor import (
    RiskMonitor,
    from_json,
    run,
    start,
    to_json,
    update,
    watch_level,
    watch_share,
)
from posthoc.contract import DataError

STREAMS = 2000


def limit(nominal: float, streams: int = STREAMS) -> float:
    return nominal + 3 * math.sqrt(nominal * (1 - nominal) / streams)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(n=st.integers(1, 3000), share=st.floats(0, 1), floor=st.floats(0.02, 0.98))
def test_evidence_is_a_mean_of_likelihood_ratios(n: int, share: float, floor: float) -> None:
    s = round(share * n)
    ratios = []
    for t in risk_monitor.SHIFTS:
        tilted = 1 / (1 + math.exp(t) * (1 - floor) / floor)
        ratios.append(binom.logpmf(s, n, tilted) - binom.logpmf(s, n, floor))
    want = (np.logaddexp.reduce(ratios) - math.log(len(ratios))) / math.log(10)
    state = update(start(floor, 0.05), n, s)
    assert state.log10_evidence == pytest.approx(want, abs=1e-8)
    assert state.log10_peak == max(0.0, state.log10_evidence)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 1000), n=st.integers(0, 300), cuts=st.lists(st.integers(0, 300)))
def test_rows_one_by_one_in_pieces_and_in_groups(seed: int, n: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    covered = rng.random(n) < 0.8
    whole, path = run(start(0.9, 0.02), covered)
    one = pieces = groups = start(0.9, 0.02)
    for i, hit in enumerate(covered):
        one = update(from_json(to_json(one)), 1, int(hit))
        assert one.log10_evidence == pytest.approx(path[i], abs=1e-12)
    for piece in np.split(covered, sorted(min(c, n) for c in cuts)):
        pieces, _ = run(pieces, piece)
        groups = update(groups, len(piece), int(piece.sum()))
    for state in (one, pieces):
        assert (state.n, state.covered) == (whole.n, whole.covered) == (n, int(covered.sum()))
        assert state.log10_evidence == pytest.approx(whole.log10_evidence, abs=1e-12)
        assert state.log10_peak == pytest.approx(whole.log10_peak, abs=1e-12)
    # A group hides the peaks inside and nothing else.
    assert groups.log10_evidence == pytest.approx(whole.log10_evidence, abs=1e-12)
    assert groups.log10_peak <= whole.log10_peak + 1e-12
    assert from_json(to_json(whole)) == whole


@settings(deadline=None, derandomize=True, max_examples=40)
@given(n=st.integers(1, 10**7), share=st.floats(0, 1), error=st.floats(1e-4, 0.45))
def test_bounds_are_where_the_evidence_is_one_over_the_error(
    n: int, share: float, error: float
) -> None:
    s = round(share * n)
    low, high = RiskMonitor(0.9, 0.02, n, s).bounds(2 * error)
    assert 0 <= low <= s / n <= high <= 1
    if high < 1:
        at = update(start(high, 0.05), n, s).log10_evidence
        assert at == pytest.approx(-math.log10(error), abs=1e-3)
    mirrored = RiskMonitor(0.9, 0.02, n, n - s).bounds(2 * error)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_no_rows_bound_nothing() -> None:
    assert start(0.9, 0.05).bounds() == (0.0, 1.0)


@pytest.mark.parametrize("wander", [0.0, 0.3])
def test_bounds_hold_at_all_times_together(wander: float) -> None:
    """Also where the mean wanders, slowly or with what was seen: the truth is its running mean."""
    streams, length, missed = 300, 500, 0
    at = np.unique(np.geomspace(1, length, 18).astype(int))
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        u, mean, hit = rng.random(length), np.empty(length), np.empty(length, bool)
        for t in range(length):
            swing = math.sin(t / 40) if seed % 2 else (1 if t and hit[t - 1] else -1)
            mean[t] = 0.6 + wander * swing
            hit[t] = u[t] < mean[t]
        truth, upto = np.cumsum(mean) / np.arange(1, length + 1), np.cumsum(hit)
        for n in at:
            low, high = RiskMonitor(0.5, 0.05, int(n), int(upto[n - 1])).bounds(0.1)
            if not low <= truth[n - 1] <= high:
                missed += 1
                break
    assert missed / streams <= limit(0.1, streams)


def test_reference_bounds_are_the_exact_ones() -> None:
    for alpha, n in ((0.1, 200), (0.05, 1000), (0.5, 40)):
        k = conformal_rank(n, alpha)
        state = watch_level(alpha, n, tolerance=0.02, error=0.06)
        assert state.floor == pytest.approx(beta.ppf(0.03, k, n + 1 - k) - 0.02)
        assert state.error == pytest.approx(0.03)
    assert watch_level(0.01, 20, tolerance=0.0).floor == 1.0  # everything is covered, always
    for hits, n in ((93, 100), (100, 100), (1, 30)):
        exact = binomtest(hits, n).proportion_ci(1 - 2 * 0.025, method="exact").low
        assert watch_share(hits, n, tolerance=0.0).floor == pytest.approx(exact)
    assert watch_share(0, 50).floor == 0.0


@pytest.mark.parametrize("tolerance", [0.0, 0.02])
def test_healthy_bundles_alarm_as_rarely_as_promised(tolerance: float) -> None:
    """Each stream has a bundle of its own, calibrated on 200 rows."""
    alarms = {0.05: 0, 0.01: 0}
    for seed in range(STREAMS):
        rng = np.random.default_rng(seed)
        q = threshold_at(np.sort(rng.exponential(size=200)), 0.1)
        covered = rng.exponential(size=1000) <= q
        for error in alarms:
            state = watch_level(0.1, 200, tolerance=tolerance, error=error)
            alarms[error] += run(state, covered)[0].alarm
    for error, count in alarms.items():
        assert count / STREAMS <= limit(error)


def test_accuracy_of_a_healthy_model_alarms_as_rarely_as_promised() -> None:
    alarms = {0.05: 0, 0.01: 0}
    for seed in range(STREAMS):
        rng = np.random.default_rng(seed)
        right = rng.random(1500) < 0.8
        for error in alarms:
            state = watch_share(int(right[:500].sum()), 500, tolerance=0.0, error=error)
            alarms[error] += run(state, right[500:])[0].alarm
    for error, count in alarms.items():
        assert count / STREAMS <= limit(error)


@pytest.mark.parametrize("wander", [0.0, 0.09])
def test_at_the_very_edge_of_the_null_too(wander: float) -> None:
    """The mean is the floor itself, or is above it first and below it then, never on average."""
    alarms = {0.05: 0, 0.01: 0}
    mean = 0.9 + wander * np.sin(np.arange(1500) / 50)
    mean[0] = 0.95
    assert (np.cumsum(mean) / np.arange(1, 1501) >= 0.9).all() and (mean < 0.82).any() == bool(
        wander
    )
    for seed in range(STREAMS):
        covered = np.random.default_rng(seed).random(1500) < mean
        for error in alarms:
            alarms[error] += run(start(0.9, error), covered)[0].alarm
    for error, count in alarms.items():
        assert count / STREAMS <= limit(error)
    assert wander or alarms[0.05] > 0


@pytest.mark.parametrize(("coverage", "within"), [(0.5, 60), (0.75, 300), (0.8, 1500)])
def test_lost_coverage_is_found(coverage: float, within: int) -> None:
    for seed in range(20):
        covered = np.random.default_rng(seed).random(within) < coverage
        assert run(watch_level(0.1, 1000), covered)[0].alarm


def test_what_cannot_be_used_is_refused() -> None:
    state = start(0.9, 0.05)
    for error in (0.0, 1.0):
        with pytest.raises(DataError, match="strictly between 0 and 1"):
            start(0.9, error)
        with pytest.raises(DataError, match="strictly between 0 and 1"):
            state.bounds(error)
    with pytest.raises(DataError, match="3 covered of 2"):
        update(state, 2, 3)
    with pytest.raises(DataError, match="7 of 5 reference rows"):
        watch_share(7, 5)
    with pytest.raises(DataError, match="row 1: covered is"):
        run(state, np.asarray([1.0, np.nan]))
    for text in ("", json.dumps({**json.loads(to_json(state)), "n": "3"})):
        with pytest.raises(DataError, match="risk monitor"):
            from_json(text)
