"""Rows held out of a fold: the same ones however the rows are cut, ordered or merged.

A page that is a sum over rows and still needs a few rows that are not in the sum holds out those
whose features hash to one residue, and of these the ``SIZE`` with the smallest hashes (a bottom-k
sample, Cohen & Kaplan 2007, "Summarizing data using bottom-k sketches"); the others go back into
the sum. Copies of a row share a hash, so that none lies on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posthoc.contract import Array, Features
from posthoc.rows import HELD_OUT, join, take

SIZE = 2000
Keys = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Held:
    """At most SIZE labelled rows, float64, in the order of their hashes ``keys``; None: none."""

    rows: Features | None = None
    keys: Keys | None = None

    def __len__(self) -> int:
        return 0 if self.rows is None else len(self.rows)


def hold(held: Held, batch: Features) -> tuple[Held, Features]:
    """(what is held out now, the rows that are not): a batch with features N×D and labels N."""
    rows = Features(
        np.asarray(batch.phi, np.float64), np.asarray(batch.z, np.float64), np.asarray(batch.y)
    )
    keys = hashes(rows.phi)
    chosen = keys % np.uint64(HELD_OUT) == 0
    more, back = _smallest(held, Held(take(rows, chosen), keys[chosen]))
    return more, join([take(rows, ~chosen), back])


def merge(a: Held, b: Held) -> tuple[Held, Features | None]:
    """(what is held out of both, the rows that go back into the sum, if there is any row)."""
    if a.rows is None or b.rows is None:
        return (b if a.rows is None else a), None
    return _smallest(a, b)


def hashes(phi: Array | None) -> Keys:
    """64-bit hashes N of the numbers in each row, whatever their float type."""
    bits = np.ascontiguousarray(np.asarray(phi, np.float64) + 0.0).view(np.uint64)  # -0 is 0
    total = (bits * _mix(np.arange(1, bits.shape[1] + 1, dtype=np.uint64))).sum(1, dtype=np.uint64)
    return _mix(total)


def _mix(x: Keys) -> Keys:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014), modulo 2**64."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _smallest(a: Held, b: Held) -> tuple[Held, Features]:
    assert b.rows is not None and b.keys is not None
    rows, keys = b.rows, b.keys
    if a.rows is not None and a.keys is not None:
        rows, keys = join([a.rows, b.rows]), np.concatenate([a.keys, b.keys])
    order = np.lexsort((rows.y, keys))  # type: ignore[arg-type]
    kept, back = order[:SIZE], order[SIZE:]
    return Held(take(rows, kept), keys[kept]), take(rows, back)
