"""Rows in blocks of one size, and the random numbers that belong to their places.

A fit reads the rows once an evaluation and must meet the same weights and pairs each time, however
the cache cuts its blocks. So they are cut anew here, and each (block, member) has a Philox stream
of its own (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which is drawn
again rather than stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from posthoc.contract import F64, Array, Features
from posthoc.rows import BLOCK, Rows, join, take

Purpose = Literal["rows", "base", "pairs"]
FAR = 4.0  # root mean squares about the mean
_PURPOSES: tuple[Purpose, ...] = ("rows", "base", "pairs")


@dataclass(frozen=True, slots=True)
class Block:
    """The rows from ``index * BLOCK`` on: features with a 1 appended N×(D+1), outputs N×C and
    labels (N, or N×K in a regression)."""

    index: int
    phi: Array
    z: Array
    y: Array

    def __len__(self) -> int:
        return len(self.phi)


def blocks(rows: Rows, dtype: np.dtype[Any]) -> Iterator[Block]:
    """The rows in blocks of BLOCK, the last one shorter; features in ``dtype``."""
    for index, part in enumerate(_cut(rows)):
        assert part.phi is not None and part.y is not None
        phi = np.ones((len(part), part.phi.shape[1] + 1), dtype)
        phi[:, :-1] = part.phi
        yield Block(index, phi, np.asarray(part.z), np.asarray(part.y))


def measure(rows: Rows) -> tuple[np.dtype[Any], F64]:
    """The type that a fit computes in, and the mean D of the features in numbers that float32 holds
    exactly: one pass.

    float64 for features in float64, and for those whose mean is far longer than what varies about
    it, because float32 would lose that beside it; else float32.
    """
    n, total, squares, wide = 0, np.zeros(1), np.zeros(1), False
    for block in rows:
        assert block.phi is not None
        phi = np.asarray(block.phi, np.float64)
        n, wide = n + len(phi), wide or block.phi.dtype == np.float64
        total, squares = total + phi.sum(0), squares + (phi**2).sum(0)
    mean = total / n
    length, varies = float(mean @ mean), float((squares / n - mean**2).sum())
    wide = wide or length > FAR**2 * varies
    return np.dtype(np.float64 if wide else np.float32), mean.astype(np.float32).astype(np.float64)


def sizes(n: int) -> list[int]:
    """Rows of each block of n rows."""
    return [min(BLOCK, n - i) for i in range(0, n, BLOCK)]


def stream(seed: int, purpose: Purpose, block: int, member: int) -> np.random.Generator:
    """The random numbers of one member in one block, for one purpose."""
    key = [seed, _PURPOSES.index(purpose)]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, block, member]))


def _cut(rows: Rows) -> Iterator[Features]:
    parts: list[Features] = []
    have = 0
    for block in rows:
        at = 0
        while at < len(block):
            more = min(BLOCK - have, len(block) - at)
            parts.append(take(block, slice(at, at + more)))
            at, have = at + more, have + more
            if have == BLOCK:
                yield join(parts)
                parts, have = [], 0
    if parts:
        yield join(parts)
