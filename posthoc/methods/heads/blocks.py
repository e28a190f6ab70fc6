"""Rows in blocks of one size, and the random numbers that belong to their places.

A fit reads the rows once an evaluation and must meet the same weights and pairs each time, however
the cache cuts them. So blocks are cut anew, and each (block, member) has a Philox stream of its
own (Salmon et al. 2011), which is drawn again instead of stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from posthoc.contract import Array, Features
from posthoc.rows import BLOCK, Rows, join, take

PILOT = -1  # the member whose random weights are their means


@dataclass(frozen=True, slots=True)
class Block:
    """Rows number ``index * BLOCK`` on: features with a 1 appended N×(D+1), outputs N×C less
    their largest, labels."""

    index: int
    phi: Array
    z: Array
    y: Array

    def __len__(self) -> int:
        return len(self.phi)


def blocks(rows: Rows, dtype: np.dtype[np.floating]) -> Iterator[Block]:
    """The rows in blocks of BLOCK, the last one shorter, in the type that a fit computes in."""
    for index, block in enumerate(_recut(rows)):
        assert block.phi is not None and block.y is not None
        phi = np.ones((len(block), block.phi.shape[1] + 1), dtype)
        phi[:, :-1] = block.phi
        z = np.asarray(block.z, np.float64)
        yield Block(index, phi, (z - z.max(1, keepdims=True)).astype(dtype), np.asarray(block.y))


def precision_of(rows: Rows) -> np.dtype[np.floating]:
    """float64 for features in float64, else float32."""
    for block in rows:
        if block.phi is not None and block.phi.dtype == np.float64:
            return np.dtype(np.float64)
        break
    return np.dtype(np.float32)


def stream(seed: int, purpose: int, block: int, member: int) -> np.random.Generator:
    """The random numbers of one member in one block, for one purpose."""
    philox = np.random.Philox(counter=[0, 0, block, member], key=[seed, purpose])
    return np.random.Generator(philox)


def sizes(n: int) -> Iterator[tuple[int, int]]:
    """(index, rows) of each block of n rows."""
    for index in range(-(-n // BLOCK)):
        yield index, min(BLOCK, n - index * BLOCK)


def _recut(rows: Rows) -> Iterator[Features]:
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
