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

from posthoc.contract import Array, Features
from posthoc.rows import BLOCK, Rows, join, take

Purpose = Literal["rows", "base", "pairs"]
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


def working_type(rows: Rows) -> np.dtype[Any]:
    """float64 for features in float64, else float32."""
    first = next(iter(rows)).phi
    wide = first is not None and first.dtype == np.float64
    return np.dtype(np.float64 if wide else np.float32)


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
