"""Worst-slice coverage: is there a direction along which sets or intervals cover less?

Cauchois, Gupta & Duchi 2021, "Knowing what you know: valid and validated confidence sets in
multiclass and multilabel prediction", JMLR 22, section 4: the least coverage over slabs
``a <= v·x <= b`` that hold at least a share δ of the rows, over random directions v. The worst of
many slabs looks bad on the rows that it was chosen by, however even coverage is; so it is chosen on
one half of the rows and measured on the other, where its coverage is that of any slab named
beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from posthoc.contract import F64, I64, Array, DataError

DIRECTIONS = 200
SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Slice:
    """A slab ``low <= (x - centre) / scale · direction <= high`` of features x.

    ``rows`` are the indices of the rows in it that did not choose it, and ``coverage`` is theirs
    (nan for none); ``chosen`` is the coverage of those that chose it, which is too low.
    """

    direction: F64
    centre: F64
    scale: F64
    low: float
    high: float
    chosen: float
    coverage: float
    rows: I64

    def holds(self, features: Array) -> Array:
        """Which of N rows (N×D) lie in the slab, N bool."""
        along = (np.asarray(features, np.float64) - self.centre) / self.scale @ self.direction
        inside: Array = (self.low <= along) & (along <= self.high)
        return inside


def worst_slice(
    features: Array,
    covered: Array,
    *,
    share: float = SHARE,
    directions: int = DIRECTIONS,
    groups: Array | None = None,
    seed: int = 0,
) -> Slice:
    """The slice of ``features`` (N×D, any description of the rows) that is covered least.

    Features are standardised by the half that chooses, so that no unit decides; one that does not
    vary is left alone. ``covered`` is N bool; ``share`` the least part δ of a half in a slab;
    rows of one of ``groups`` (N) stay in one half. Raises DataError for shapes that do not match,
    features that are not finite, a share outside (0, 1], and halves of less than two rows.
    """
    x, hit = np.asarray(features, dtype=np.float64), np.asarray(covered, dtype=bool)
    if x.ndim != 2 or not x.shape[1] or hit.shape != (len(x),):
        raise DataError(f"features of shape {x.shape} do not match covered {hit.shape}")
    if not np.isfinite(x).all():
        row = int(np.argmin(np.isfinite(x).all(axis=1)))
        raise DataError(f"row {row}: a feature is no finite number")
    if not 0 < share <= 1:
        raise DataError(f"the least share of a slice lies in (0, 1], which {share} does not")
    rng = np.random.default_rng(seed)
    first = _half(len(x), groups, rng)
    if min(first.sum(), (~first).sum()) < 2:
        raise DataError("a worst slice needs at least two rows on either half")
    centre, scale = x[first].mean(axis=0), x[first].std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    seen, known = (x[first] - centre) / scale, hit[first]
    least = max(1, int(np.ceil(share * len(seen) - 1e-9)))
    best: tuple[float, float, float, F64] | None = None
    v: F64
    for _ in range(directions):
        v = rng.standard_normal((x.shape[1],))
        v = v / np.linalg.norm(v)
        along = seen @ v
        order = np.argsort(along)
        found = least_covered(along[order], known[order], least)
        if best is None or found[2] < best[2]:
            best = (*found, v)
    if best is None:
        raise DataError("a worst slice needs at least one direction")
    low, high, chosen, direction = best
    none = np.zeros(0, np.int64)
    slab = Slice(direction, centre, scale, low, high, chosen, np.nan, none)
    rows = np.flatnonzero(~first & slab.holds(x))
    return replace(slab, coverage=float(hit[rows].mean()) if len(rows) else np.nan, rows=rows)


def least_covered(along: F64, covered: Array, least: int) -> tuple[float, float, float]:
    """(low, high, coverage) of the stretch of ascending ``along`` (N) with at least ``least`` of
    the rows and the least share ``covered``; it takes or leaves rows of one value together.

    Exact: with the best share so far as price, the stretch whose misses are worth most is found in
    one pass over running sums, and its share is the next price (Dinkelbach 1967); a few passes.
    """
    n = len(along)
    starts = np.concatenate([[True], along[1:] != along[:-1]])
    ends = np.concatenate([starts[1:], [True]])
    hits = np.concatenate([[0], np.cumsum(covered)])
    count = np.arange(n + 1)
    rate, best = float(hits[-1]) / n, (0, n)
    while True:
        gain = rate * count - hits
        # Up to where a stretch that ends at row j may start, the least sum before it.
        before = np.where(starts, gain[:-1], np.inf)[: n - least + 1]
        place = np.maximum.accumulate(
            np.where(before <= np.minimum.accumulate(before), np.arange(len(before)), 0)
        )
        won = np.where(ends[least - 1 :], gain[least:] - before[place], -np.inf)
        j = int(np.argmax(won))
        i = int(place[j])
        found = float(hits[j + least] - hits[i]) / (j + least - i)
        if found >= rate:
            break
        rate, best = found, (i, j + least)
    return float(along[best[0]]), float(along[best[1] - 1]), rate


def _half(n: int, groups: Array | None, rng: np.random.Generator) -> Array:
    """Which rows are of the first half, N bool; a group is whole."""
    if groups is None:
        return rng.permutation(n) < n // 2
    names, code = np.unique(np.asarray(groups), return_inverse=True)
    return np.asarray(rng.permutation(len(names)) < len(names) // 2)[code]
