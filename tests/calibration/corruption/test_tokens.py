"""Tokens replaced by others: how many, by which, and which are left alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.corruption import tokens
from calibration.corruption.tokens import measure, replaced
from posthoc.contract import DataError


def sequences(n: int = 4000, dtype: str = "int64") -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.choice([3, 5, 8, 13], p=[0.1, 0.2, 0.3, 0.4], size=(n, 10)).astype(dtype)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_as_many_as_the_severity_says_are_others_by_frequency(severity: int, dtype: str) -> None:
    x = sequences(dtype=dtype)
    got = replaced(x, severity, keys=np.arange(len(x)))
    assert got.dtype == x.dtype
    changed = got != x
    share = tokens.REPLACED[severity - 1]
    assert changed.mean() == pytest.approx(share, abs=5 * np.sqrt(share / x.size))
    chances = {v: (x == v).mean() for v in (3, 5, 8, 13)}
    for own in chances:
        drawn = got[changed & (x == own)]
        assert own not in drawn
        for other in chances.keys() - {own}:
            want = chances[other] / (1 - chances[own])
            slack = 5 * np.sqrt(want * (1 - want) / len(drawn))
            assert (drawn == other).mean() == pytest.approx(want, abs=slack)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    rows=st.lists(st.lists(st.integers(-3, 6), min_size=3, max_size=3), min_size=1, max_size=8),
    keep=st.sets(st.integers(-3, 6), max_size=3),
)
def test_kept_tokens_stay_and_stand_for_none(rows: list[list[int]], keep: set[int]) -> None:
    x = np.array(rows)
    known = measure(x, keep=keep)
    if len(set(x.ravel().tolist()) - keep) < 2:
        with pytest.raises(DataError, match="no two tokens"):
            replaced(x, 5, reference=known)
        return
    got = replaced(x, 5, reference=known)
    kept = np.isin(x, list(keep))
    np.testing.assert_array_equal(got[kept], x[kept])
    assert not np.isin(got[got != x], list(keep)).any()
    assert np.isin(got, x).all()


def test_severities_go_on_from_one_another() -> None:
    x = sequences(200)
    steps = [replaced(x, s) for s in range(1, 6)]
    for less, more in pairwise(steps):
        np.testing.assert_array_equal(more[less != x], less[less != x])
        assert (more != x).sum() > (less != x).sum()


def test_masks_and_their_like_are_left_alone() -> None:
    ids = sequences(300)
    mask = (np.arange(10) < np.arange(300)[:, None] % 11).astype(np.int64)
    x = {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * 0}
    assert list(measure(x)) == ["input_ids"]
    got = replaced(x, 5)
    np.testing.assert_array_equal(got["attention_mask"], mask)
    np.testing.assert_array_equal(got["token_type_ids"], mask * 0)
    changed = got["input_ids"] != ids
    assert changed[mask == 1].any() and not changed[mask == 0].any()
    assert list(measure({"type_mask": ids})) == ["type_mask"]  # there is nothing else


def test_a_token_that_the_reference_lacks_is_replaced_too() -> None:
    known = measure(sequences(50))
    got = replaced(np.full((400, 10), 99), 5, reference=known, keys=np.arange(400))
    assert set(got.ravel().tolist()) == {3, 5, 8, 13, 99}


def test_what_are_no_tokens_is_named() -> None:
    for bad in (np.zeros((3, 4)), np.zeros((3, 1), int), np.zeros(3, int)):
        with pytest.raises(DataError, match="input 'x': no tensor is N×T integers"):
            replaced({"x": bad}, 1)
    with pytest.raises(DataError, match=r"input 'x' of shape .* holds no token"):
        replaced({"x": np.zeros((0, 4), int)}, 1)
