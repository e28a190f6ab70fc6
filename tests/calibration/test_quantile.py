"""Two-pass order statistics against a full sort."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.bundle import conformal_rank, threshold_at
from calibration.quantile import (
    from_sortable_bits,
    order_statistics,
    quantiles,
    ranked,
    sortable_bits,
    upper_counts,
)
from posthoc.contract import DataError
from posthoc.folds import run

modest = settings(deadline=None, derandomize=True, max_examples=100)
float32s = st.floats(width=32, allow_nan=False, allow_infinity=True, allow_subnormal=True)
TINY = [1e-45, 1e-40, 1.1754944e-38]  # two subnormals and the smallest normal number
POSITIVE = [0.0, *TINY, 1.0, 3.4028235e38, np.inf]
EXTREMES = np.array([-x for x in POSITIVE[::-1]] + POSITIVE, dtype=np.float32)


@modest
@given(st.lists(float32s, min_size=1, max_size=60), st.integers(1, 7))
def test_every_rank_is_that_of_a_sort(numbers: list[float], pieces: int) -> None:
    x = np.array(numbers, dtype=np.float32)
    found = order_statistics(np.array_split(x, pieces), lambda n: range(1, n + 1))
    np.testing.assert_array_equal(found, np.sort(x))


@modest
@given(st.lists(float32s, min_size=2, max_size=40))
def test_sortable_bits_order_like_the_numbers(numbers: list[float]) -> None:
    x = np.array(numbers, dtype=np.float32)
    bits = sortable_bits(x)
    np.testing.assert_array_equal(from_sortable_bits(bits).view(np.uint32), x.view(np.uint32))
    below = x[:, None] < x[None, :]
    assert (bits[:, None] < bits[None, :])[below].all()


def test_zeros_subnormals_and_infinities() -> None:
    x = np.repeat(EXTREMES, 3)[np.random.default_rng(0).permutation(42)]
    found = order_statistics([x[:5], x[5:]], lambda n: range(1, n + 1))
    np.testing.assert_array_equal(found, np.sort(x))
    assert (np.signbit(found).cumsum() == np.minimum(np.arange(1, 43), 21)).all()


def test_a_million_numbers_in_uneven_chunks() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal(size=500_000), rng.integers(0, 40, 400_000) / 10, rng.gamma(0.05, size=100_000)]
    ).astype(np.float32)
    rng.shuffle(x)
    chunks = np.split(x, np.sort(rng.integers(0, len(x), 30)))
    ranks = [1, 2, 17, 123_456, 500_000, 999_999, 1_000_000]
    want = np.sort(x)[np.array(ranks) - 1]
    np.testing.assert_array_equal(order_statistics(chunks, lambda n: ranks), want)
    square = x.reshape(1000, 1000).T  # neither flat nor contiguous
    np.testing.assert_array_equal(order_statistics([square], lambda n: ranks), want)
    levels = [0.0, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0]
    np.testing.assert_array_equal(
        quantiles(chunks, levels), np.quantile(x, levels, method="inverted_cdf")
    )


class Repeated:
    """The same chunk over and over."""

    def __init__(self, chunk: np.ndarray, times: int) -> None:
        self.chunk, self.times = chunk, times

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.chunk for _ in range(self.times))


def test_there_is_no_limit_at_two_to_the_24() -> None:
    chunk = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
    stream = Repeated(chunk, 17)
    n = 17 << 20
    ranks = [1, (1 << 24) + 1, conformal_rank(n, 0.01), n, n + 1]
    found = order_statistics(stream, lambda _: ranks)
    want = np.append(np.sort(chunk)[[(r - 1) // 17 for r in ranks[:-1]]], np.inf)
    np.testing.assert_array_equal(found, want)


def test_memory_does_not_grow_with_the_stream() -> None:
    def peak(times: int) -> int:
        stream = Repeated(chunk, times)
        tracemalloc.start()
        quantiles(stream, [0.1, 0.9])
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    chunk = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    peak(1)
    assert peak(20) < 1.2 * peak(2)


@modest
@given(st.lists(float32s, min_size=1, max_size=50), st.floats(0, 1))
def test_shares_of_a_stream_are_merged(numbers: list[float], cut: float) -> None:
    """Two workers that each see a part find what one finds that sees all."""
    x = np.array(numbers, dtype=np.float32)
    a, b = np.split(x, [round(cut * len(x))])

    def both(fold: Any) -> Any:
        one, other = fold.update(fold.init(), a), fold.update(fold.init(), b)
        return fold.merge(other, fold.merge(one, fold.init()))

    upper = both(upper_counts)
    np.testing.assert_array_equal(upper, run(upper_counts, [x]))
    second = ranked(upper, range(1, len(x) + 2))
    np.testing.assert_array_equal(second.result(both(second)), np.append(np.sort(x), np.inf))


@pytest.mark.parametrize("n", [5, 9, 45, 99])
def test_conformal_ranks_beyond_the_stream_are_infinite(n: int) -> None:
    x = np.random.default_rng(n).normal(size=n).astype(np.float32)
    alphas = [0.01, 0.1, 0.5]
    found = order_statistics([x], lambda m: [conformal_rank(m, a) for a in alphas])
    assert found.tolist() == [threshold_at(np.sort(x), a) for a in alphas]


@pytest.mark.parametrize("nan", [np.nan, -np.nan, np.uint32(0xFFC00001).view(np.float32)])
def test_nan_is_refused_by_its_place(nan: float) -> None:
    x = np.zeros(10, np.float32)
    x[3] = nan
    with pytest.raises(DataError, match="number 13 of the stream is NaN"):
        quantiles([np.ones((2, 5), np.float32), x], [0.5])


def test_nan_deep_in_a_long_chunk_is_refused_by_its_place() -> None:
    x = np.zeros((1 << 20) + 10, np.float32)
    x[-4] = np.nan
    with pytest.raises(DataError, match=f"number {len(x) + 1} of the stream is NaN"):
        quantiles([np.zeros(5, np.float32), x], [0.5])


def test_narrow_numbers_are_taken_and_wide_ones_refused() -> None:
    assert quantiles([np.array([3, 1, 2], np.uint8)], [0.5]).tolist() == [2.0]
    assert quantiles([np.array([0.5, 0.25], np.float16)], [0.5]).tolist() == [0.25]
    with pytest.raises(DataError, match="float64 are not all float32"):
        quantiles([np.zeros(3)], [0.5])


def test_what_has_no_answer_is_named() -> None:
    x = np.zeros(4, np.float32)
    with pytest.raises(DataError, match="chunks is an iterator"):
        quantiles(iter([x]), [0.5])
    with pytest.raises(DataError, match="at least one number"):
        quantiles([], [0.5])
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        quantiles([x], [1.5])
    for rank in (0, 6):
        with pytest.raises(DataError, match="1…5, for 4 numbers"):
            order_statistics([x], lambda n, rank=rank: [rank])
    assert order_statistics([], lambda n: [n + 1]).tolist() == [np.inf]
    assert order_statistics([x], lambda n: []).shape == (0,)

    class Changing:
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self) -> Iterator[np.ndarray]:
            self.passes += 1
            return iter([np.full(4, self.passes, np.float32)])

    with pytest.raises(DataError, match="other numbers than the first"):
        quantiles(Changing(), [0.5])
