"""Exact order statistics of arbitrarily many float32 numbers, in two passes and little memory.

A float32 is 32 bits, and after one flip of its sign bits (``sortable_bits``) the bits order like
the numbers. The first pass counts the upper 16 bits, which tells the bucket that holds a rank; the
second counts the lower 16 bits inside that bucket, which is the number itself. Both passes are
folds over counts: 512 KiB, and 512 KiB more for each bucket asked for, whatever the stream holds.
Nothing is sampled, interpolated or rounded, and no count stops at 2^24.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from posthoc.contract import I64, Array, DataError
from posthoc.folds import Fold, run

F32 = NDArray[np.float32]
_BUCKETS = 1 << 16
_BLOCK = 1 << 20  # numbers worked on at a time, so that one huge chunk needs no more memory


def sortable_bits(x: F32) -> NDArray[np.uint32]:
    """uint32 of the shape of x whose order is that of the numbers; -0.0 lies just below 0.0."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.int32)
    flip = (bits >> 31) | np.int32(-(1 << 31))  # a negative number: every bit, else the sign
    return (bits ^ flip).view(np.uint32)


def from_sortable_bits(bits: Array) -> F32:
    """The float32 numbers whose ``sortable_bits`` these are."""
    b = np.asarray(bits, dtype=np.uint32).view(np.int32)
    flip = (~b >> 31) | np.int32(-(1 << 31))
    return (b ^ flip).view(np.float32)


def _update_upper(counts: I64, chunk: Array) -> I64:
    new = counts.copy()
    for bits in _blocks(chunk, seen=int(counts.sum())):
        new += np.bincount(bits >> 16, minlength=_BUCKETS)
    return new


upper_counts: Fold[I64, Array, I64] = Fold(
    init=lambda: np.zeros(_BUCKETS, dtype=np.int64),
    update=_update_upper,
    merge=lambda a, b: a + b,
    result=lambda counts: counts,
)
"""The first pass, over chunks of any shape: how many numbers share each upper half (65,536).

Raises DataError for a NaN, naming its place in the stream, and for a dtype wider than float32.
"""


def ranked(upper: I64, ranks: Sequence[int]) -> Fold[I64, Array, F32]:
    """The second pass over the same numbers: a fold whose result holds the numbers at ``ranks``.

    ``upper`` is the result of ``upper_counts``; ranks count from 1 in ascending order, and rank
    n + 1 of n numbers is +inf, as a conformal rank that is too large must be. Raises DataError
    for another rank, and at the result where the second pass saw other numbers than the first.
    """
    n = int(upper.sum())
    wanted = np.asarray(ranks, dtype=np.int64)
    if len(wanted) and not (wanted.min() >= 1 and wanted.max() <= n + 1):
        raise DataError(f"ranks {list(ranks)} do not all lie in 1…{n + 1}, for {n} numbers")
    at_most = np.cumsum(upper)
    bucket = np.searchsorted(at_most, np.minimum(wanted, n))
    inside = wanted - (at_most[bucket] - upper[bucket])
    buckets, row = np.unique(bucket, return_inverse=True)
    slot = np.full(_BUCKETS, -1, dtype=np.int64)
    slot[buckets] = np.arange(len(buckets))

    def update(counts: I64, chunk: Array) -> I64:
        new = counts.copy()
        for bits in _blocks(chunk, seen=0):
            rows = slot[bits >> 16]
            hit = rows >= 0
            low = rows[hit] * _BUCKETS + (bits[hit] & (_BUCKETS - 1))
            new += np.bincount(low, minlength=new.size).reshape(new.shape)
        return new

    def result(counts: I64) -> F32:
        if (counts.sum(axis=1) != upper[buckets]).any():
            raise DataError("the second pass saw other numbers than the first: chunks must repeat")
        found = np.full(len(wanted), np.inf, dtype=np.float32)
        for i in np.flatnonzero(wanted <= n):
            low = np.searchsorted(np.cumsum(counts[row[i]]), inside[i])
            found[i] = from_sortable_bits((int(bucket[i]) << 16) + low)
        return found

    def init() -> I64:
        return np.zeros((len(buckets), _BUCKETS), dtype=np.int64)

    return Fold(init, update, lambda a, b: a + b, result)


def order_statistics(chunks: Iterable[Array], ranks: Callable[[int], Sequence[int]]) -> F32:
    """The numbers at the ranks that ``ranks(n)`` asks for among all n numbers of ``chunks``.

    ``chunks`` is gone through twice and must give the same numbers both times: a list, a memory
    map cut into pieces, an object with ``__iter__``. For conformal thresholds
    ``ranks=lambda n: [conformal_rank(n, alpha)]``. Raises DataError for an iterator, which ends
    after one pass, and as ``upper_counts`` and ``ranked`` do.
    """
    if iter(chunks) is chunks:
        raise DataError(
            "chunks is an iterator, which ends after the first of two passes; "
            "give a list or an object whose __iter__ starts anew"
        )
    upper = run(upper_counts, chunks)
    return run(ranked(upper, ranks(int(upper.sum()))), chunks)


def quantiles(chunks: Iterable[Array], levels: Sequence[float]) -> F32:
    """For each level the smallest number with at least that share of all numbers at or below it.

    That is the inverse of the empirical distribution function (Hyndman & Fan 1996, "Sample
    quantiles in statistical packages", type 1): one of the numbers, never an interpolation.
    Raises DataError for a level outside [0, 1] or no numbers, and as ``order_statistics`` does.
    """
    if not all(0 <= level <= 1 for level in levels):
        raise DataError(f"quantile levels {list(levels)} do not all lie in [0, 1]")

    def ranks(n: int) -> list[int]:
        if not n:
            raise DataError("a quantile needs at least one number and there is none")
        # Rounding first, as conformal_rank does: n * level can land a hair above an integer.
        return [max(1, math.ceil(round(n * level, 9))) for level in levels]

    return order_statistics(chunks, ranks)


def _blocks(chunk: Array, seen: int) -> Iterator[NDArray[np.uint32]]:
    """Sortable bits of a chunk, a block at a time; ``seen`` numbers came before it."""
    x = np.asarray(chunk)
    if not np.can_cast(x.dtype, np.float32, "safe"):
        raise DataError(f"numbers of {x.dtype} are not all float32 numbers; cast them to float32")
    flat = x.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK].astype(np.float32, copy=False)
        missing = np.isnan(block)
        if missing.any():
            place = seen + start + int(missing.argmax())
            raise DataError(f"number {place} of the stream is NaN, which has no rank; leave it out")
        yield sortable_bits(block)
