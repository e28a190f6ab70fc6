"""A bounded sample of rows that is the same however rows are cut, ordered or merged.

Kept are the ``size`` rows of the smallest hashes of what is in them (a bottom-k sample, Cohen &
Kaplan 2007, "Summarizing data using bottom-k sketches"): as good as random, without a random
number. Copies of a row share a hash, so that all of them are in the sample or, but for the last
one, none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from posthoc.contract import Array, Features, FitError
from posthoc.rows import join as join_rows
from posthoc.rows import take

Keys = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Sample:
    """At most ``size`` rows of ``seen``: ``kept`` in the order of their hashes ``keys`` (equal ones
    by their bytes), and blocks ``waiting`` to be sorted in, of rows that may be among them."""

    size: int
    seen: int = 0
    kept: Features | None = None
    keys: Keys | None = None
    waiting: tuple[tuple[Features, Keys], ...] = ()

    def __len__(self) -> int:
        return min(self.size, self.seen)

    @property
    def rows(self) -> Features:
        """The rows in the order of their hashes; FitError if there is none. Features and outputs
        are float32, labels int64 or float64."""
        kept = _sorted_in(self).kept
        if kept is None:
            raise FitError("this score needs rows and was given no rows")
        return kept

    @property
    def phi(self) -> Array:
        """Features n×D; FitError without rows, or where the model gives none."""
        phi = self.rows.phi
        if phi is None:
            raise FitError("this score needs features; the model is a black box")
        return phi

    @property
    def z(self) -> Array:
        """Outputs n×C; FitError without rows."""
        return self.rows.z

    @property
    def y(self) -> Array:
        """Labels; FitError without rows, or where they have none."""
        y = self.rows.y
        if y is None:
            raise FitError("this score needs labels")
        return y


def empty(size: int) -> Sample:
    """No rows yet, and room for ``size``."""
    return Sample(size)


def add(sample: Sample, batch: Features, name: str = "this score") -> Sample:
    """The sample of the rows so far and of a batch.

    Raises FitError, which names the score ``name``, for numbers that are not finite in float32.
    """
    if not len(batch):
        return sample
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        phi = None if batch.phi is None else np.array(batch.phi, np.float32)
        z = np.array(batch.z, np.float32)
    if phi is not None and not np.isfinite(phi).all():
        raise FitError(f"{name} met features that are not finite")
    if not np.isfinite(z).all():
        raise FitError(f"{name} met outputs that are not finite")
    y = None if batch.y is None else np.asarray(batch.y)
    if y is not None:
        y = np.array(y, np.int64 if y.dtype.kind in "biu" else np.float64)
    rows = Features(phi, z, y)
    keys = hashes(z if phi is None else phi)
    seen = sample.seen + len(rows)
    if sample.keys is not None and len(sample.keys) == sample.size:
        may = keys <= sample.keys[-1]
        rows, keys = take(rows, may), keys[may]
    more = replace(sample, seen=seen, waiting=(*sample.waiting, (rows, keys)))
    # Sorting in copies the whole sample; once in as many rows as it holds that costs little.
    return _sorted_in(more) if sum(len(k) for _, k in more.waiting) >= sample.size else more


def join(a: Sample, b: Sample) -> Sample:
    """The sample of the rows of both, of the size of ``a``."""
    parts = (*_parts(a), *_parts(b))
    return _sorted_in(Sample(a.size, a.seen + b.seen, waiting=parts))


def hashes(values: Array) -> Keys:
    """64-bit hashes N of the float32 numbers N×D in each row: a multiply-shift of their bits,
    summed, and the finaliser of SplitMix64."""
    numbers = np.asarray(values, np.float32).reshape(len(values), -1) + np.float32(0.0)  # -0 is 0
    bits = np.ascontiguousarray(numbers).view(np.uint32).astype(np.uint64)
    bits *= _mix(np.arange(1, bits.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    # Without this, numbers of few digits, whose last bits are 0, would have hashes of few bits.
    bits ^= bits >> np.uint64(29)
    return _mix(bits.sum(1, dtype=np.uint64))


def _mix(x: Keys) -> Keys:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014), modulo 2**64."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _parts(sample: Sample) -> tuple[tuple[Features, Keys], ...]:
    if sample.kept is None or sample.keys is None:
        return sample.waiting
    return ((sample.kept, sample.keys), *sample.waiting)


def _sorted_in(sample: Sample) -> Sample:
    """The same with no row waiting."""
    if not sample.waiting:
        return sample
    parts = _parts(sample)
    if len({(r.phi is None, r.y is None) for r, _ in parts}) > 1:
        raise FitError("this score needs features and labels of all rows or of none")
    rows, keys = join_rows([r for r, _ in parts]), np.concatenate([k for _, k in parts])
    order = _order(rows, keys)[: sample.size]
    return replace(sample, kept=take(rows, order), keys=keys[order], waiting=())


def _order(rows: Features, keys: Keys) -> Array:
    """By hash, equal hashes by the bytes of the row."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(same):
        tied = np.union1d(same, same + 1)
        columns: Sequence[Array | None] = (rows.phi, rows.z, rows.y)

        def key(row: int) -> tuple[int, bytes]:
            return int(keys[row]), b"".join(c[row].tobytes() for c in columns if c is not None)

        order[tied] = sorted(order[tied], key=key)
    return order
