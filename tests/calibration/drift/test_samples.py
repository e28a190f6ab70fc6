"""EATA's filter as a monitor, against a loop over rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.drift.samples import from_json, redundant_from, start, to_json, update
from posthoc.contract import DataError


def probabilities(rng: np.random.Generator, n: int, c: int, sure: float) -> np.ndarray:
    z = rng.normal(size=(n, c)) * sure
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def slow(probs: np.ndarray) -> tuple[int, int, int]:
    """(reliable, compared, redundant) rows."""
    c = probs.shape[1]
    even = 1 / math.sqrt(c)
    margin = min(0.05 * math.sqrt(1000) * even, (1 + even) / 2)
    mean: np.ndarray | None = None
    batch: list[np.ndarray] = []
    reliable = compared = redundant = 0
    for p in probs:
        if -sum(x * math.log(x) for x in p if x > 0) >= 0.4 * math.log(c):
            continue
        reliable += 1
        if mean is not None:
            compared += 1
            redundant += float(p @ mean) / math.sqrt(float(p @ p) * float(mean @ mean)) >= margin
        batch.append(p)
        if len(batch) == 64:
            new = np.mean(batch, axis=0)
            mean = new if mean is None else 0.9 * mean + 0.1 * new
            batch = []
    return reliable, compared, redundant


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    c=st.integers(2, 12),
    cuts=st.lists(st.integers(0, 600), max_size=4),
)
def test_counts_are_the_loops_however_the_stream_is_cut(seed: int, c: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    probs = probabilities(rng, 600, c, 4.0)
    probs[::50] = np.eye(c)[0]  # certain
    whole = update(start(c), probs)
    assert (whole.reliable, whole.compared, whole.redundant) == slow(probs)
    parts = start(c)
    for piece in np.split(probs, sorted(cuts)):
        parts = update(from_json(to_json(parts)), piece)
    assert (parts.n, parts.reliable, parts.compared, parts.redundant, parts.waiting) == (
        whole.n,
        whole.reliable,
        whole.compared,
        whole.redundant,
        whole.waiting,
    )
    np.testing.assert_allclose(parts.mean, whole.mean, atol=1e-12)
    assert from_json(to_json(whole)) == whole


def test_harder_rows_are_less_reliable_and_a_narrowed_stream_is_redundant() -> None:
    rng = np.random.default_rng(0)
    usual = update(start(10), probabilities(rng, 2000, 10, 6.0))
    harder = update(start(10), probabilities(rng, 2000, 10, 2.0))
    assert harder.reliable_share < 0.5 * usual.reliable_share
    assert usual.redundant_share < 0.2
    z = rng.normal(size=(2000, 10)) * 6
    z[:, 3] += 20
    narrow = np.exp(z - z.max(axis=1, keepdims=True))
    narrowed = update(start(10), narrow / narrow.sum(axis=1, keepdims=True))
    assert narrowed.redundant_share > 0.95


def test_the_margin_is_the_authors_at_a_thousand_classes() -> None:
    assert redundant_from(1000) == pytest.approx(0.05)
    assert all(1 / math.sqrt(c) < redundant_from(c) < 1 for c in range(2, 2000))


def test_no_rows_and_what_cannot_be_used() -> None:
    none = update(start(3), np.zeros((0, 3)))
    assert math.isnan(none.reliable_share) and math.isnan(none.redundant_share)
    with pytest.raises(DataError, match=r"of 3 classes have shape \(2, 4\)"):
        update(none, np.ones((2, 4)))
    with pytest.raises(DataError, match="row 1"):
        update(none, np.asarray([[1, 0, 0], [np.nan, 0, 1]]))
    with pytest.raises(DataError, match="do not match"):
        from_json(to_json(none).replace('"mean":[]', '"mean":[1.0]'))
    with pytest.raises(DataError, match="'samples'"):
        from_json("[]")
