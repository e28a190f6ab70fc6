"""What chance allows of cells of coverage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import betabinom, norm

from bench.coverage_cells import Cell
from calibration.bundle import conformal_rank
from calibration.metrics.coverage import coverage_band
from posthoc.contract import Array

NULLS = 4000
BINS = np.linspace(-5, 5, 41)  # of positions

band = lru_cache(maxsize=None)(coverage_band)


def inside(cell: Cell) -> bool:
    """Whether a cell lies in the 99 % band of its sizes, or above its lower edge where only that
    counts."""
    low, high = band(cell.n, cell.m, cell.alpha)
    share = cell.covered / cell.m
    return low <= share and (cell.lower or share <= high)


def position(cell: Cell) -> float:
    """Where a cell lies in the law of its sizes, as a number that is standard normal by chance."""
    k = conformal_rank(cell.n, cell.alpha)
    if k > cell.n:
        return 0.0
    law = betabinom(cell.m, k, cell.n + 1 - k)
    # As in `coverage_band`: beyond 12 sd there is no mass to find.
    first = max(0, int(law.mean() - 12 * law.std() - 12))
    last = min(cell.covered, int(law.mean() + 12 * law.std() + 12))
    below = law.pmf(np.arange(first, last + 1)).sum() - law.pmf(cell.covered) / 2
    return float(norm.ppf(np.clip(below, 1e-9, 1 - 1e-9)))


def allowed(found: Sequence[tuple[str, int, Cell]]) -> int:
    """The 99.9 % quantile of how many of these cells, each with its set and seed, are outside when
    the ranks of the n + m rows of each are in any order.

    The k-th of n among n + m has a beta-binomial number of the m below it. The levels of one split
    and part share their rows, and so do the draws: one Dirichlet of the gaps between the ranks.
    """
    groups: dict[tuple[str, int, str], list[Cell]] = defaultdict(list)
    for name, seed, cell in found:
        groups[name, seed, cell.part].append(cell)
    rng = np.random.default_rng(0)
    total = np.zeros(NULLS, int)
    for rows in groups.values():
        total += _outside(sorted(rows, key=lambda c: -c.alpha), rng)
    return int(np.quantile(total, 0.999, method="higher"))


def _outside(rows: list[Cell], rng: np.random.Generator) -> Array:
    """How many of the levels of one part, by rising rank, are outside in each of NULLS draws."""
    n, m = rows[0].n, rows[0].m
    ranks = [conformal_rank(n, c.alpha) for c in rows]
    shape = np.diff([0, *ranks, n + 1]).astype(float)
    gaps = rng.gamma(shape, size=(NULLS, len(shape)))
    counts = rng.multinomial(m, gaps / gaps.sum(1, keepdims=True))
    share = np.cumsum(counts[:, :-1], axis=1) / m
    out = np.zeros(NULLS, int)
    for cell, value in zip(rows, share.T, strict=True):
        low, high = band(n, m, cell.alpha)
        out += (value < low) | ((value > high) & (not cell.lower))
    return out
