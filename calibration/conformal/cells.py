"""Thresholds of their own for classes, clusters of classes, or groups of rows.

A marginal threshold covers a class or a group as often as it happens to. Split conformal within a
cell covers the cell: of rows whose true class is c (Vovk, Lindsay, Nouretdinov & Gammerman 2003,
"Mondrian confidence machine"; Sadinle, Lei & Wasserman 2019), of a cluster of classes (Ding et al.
2023, arXiv:2306.09335), or of rows of a group that is known beforehand, by ranks among the
conformal rows of that cell alone. A cell with fewer than 1/alpha - 1 of them has threshold +inf:
its class is in every set, its rows have the full set, and nothing is under-covered silently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from calibration.bundle import CellRecord, conformal_rank, threshold_at
from posthoc.contract import F64, I64, Array, DataError

By = Literal["class", "cluster", "group"]
UNKNOWN = -1  # a group that nobody knows, and a class without a cluster
DEFAULTS = {"group": UNKNOWN, "u": 0.0}  # of the optional inputs of a row
SCORES, COUNTS, OF = "cell_scores", "cell_counts", "cell_of"


@dataclass(frozen=True, slots=True)
class Cells:
    """Conformal scores by cell: ``scores`` (n), ascending within each cell, cell after cell, with
    ``counts`` M; all of them ascending in ``every``.

    ``of`` is the cell of each class (C, UNKNOWN: all rows together) or, by group, the code of each
    group, ascending (M). ``names`` M are the cells' own.
    """

    by: By
    of: I64
    names: tuple[str, ...]
    scores: Array
    counts: I64
    every: Array

    @property
    def width(self) -> int:
        """Thresholds of one level: one a class; by group one a group, and the one of the rest."""
        return len(self.of) + (self.by == "group")

    def thresholds(self, alpha: float) -> F64:
        """The thresholds of a level, `width` of them.

        A group that is not known has the last, of all rows together.
        """
        starts = np.cumsum(self.counts) - self.counts
        own = [
            threshold_at(self.scores[s : s + n], alpha)
            for s, n in zip(starts, self.counts, strict=True)
        ]
        rest = threshold_at(self.every, alpha)
        if self.by == "group":
            return np.asarray([*own, rest])
        return np.asarray([rest if cell == UNKNOWN else own[cell] for cell in self.of])

    def records(self, alpha: float) -> tuple[CellRecord, ...]:
        """What each cell promises at a level, for the manifest."""
        starts = np.cumsum(self.counts) - self.counts
        found = []
        for name, start, count in zip(self.names, starts, self.counts, strict=True):
            n = int(count)
            q = threshold_at(self.scores[start : start + n], alpha)
            rank = conformal_rank(n, alpha)
            threshold = None if math.isinf(q) else q
            found.append(CellRecord(name=name, n=n, rank=rank, threshold=threshold))
        return tuple(found)

    def tensors(self) -> dict[str, Array]:
        """What a bundle keeps beside the sorted scores of all rows."""
        return {SCORES: self.scores, COUNTS: self.counts, OF: self.of}


def cells(
    by: By,
    scores: Array,
    members: Array,
    of: Array,
    names: Sequence[str],
) -> Cells:
    """The cells of n conformal scores: ``members`` (n) are the cells that they fall in, UNKNOWN for
    none, ``of`` and ``names`` as in `Cells`.

    Raises DataError for a member that is no cell.
    """
    s, cell = np.asarray(scores), np.asarray(members, np.int64)
    if len(s) != len(cell):
        raise DataError(f"{len(s)} conformal scores and {len(cell)} cells do not go together")
    if cell.min(initial=0) < UNKNOWN or cell.max(initial=UNKNOWN) >= len(names):
        raise DataError(f"a cell lies outside 0..{len(names) - 1}")
    order = np.lexsort((s, cell))
    inside = order[cell[order] != UNKNOWN]
    counts = np.bincount(cell[inside], minlength=len(names)).astype(np.int64)
    return Cells(by, np.asarray(of, np.int64), tuple(names), s[inside], counts, np.sort(s))


def restored(by: By, names: Sequence[str], tensors: Mapping[str, Array], every: Array) -> Cells:
    """The cells that a bundle keeps."""
    return Cells(by, tensors[OF], tuple(names), tensors[SCORES], tensors[COUNTS], every)


def group_index(codes: Array, group: Array) -> I64:
    """Where the groups of N rows are among ascending ``codes`` M; M for a group that is not."""
    codes, group = np.asarray(codes, np.int64), np.asarray(group, np.int64)
    place = np.minimum(np.searchsorted(codes, group), max(0, len(codes) - 1))
    known = codes[place] == group if len(codes) else np.zeros(len(group), bool)
    return np.where(known, place, len(codes)).astype(np.int64)


def named_codes(groups: Array, codes: Array, names: Sequence[str]) -> I64:
    """The codes of a column of N groups, by name; UNKNOWN for a name that nobody has.

    A whole number is looked up by its digits: where groups were texts it is none of their codes.
    """
    values = np.asarray(groups)
    known = dict(zip(names, np.asarray(codes).tolist(), strict=True))
    return np.asarray([known.get(str(v), UNKNOWN) for v in values.tolist()], np.int64)


def group_codes(named: Array) -> tuple[I64, I64, tuple[str, ...]]:
    """(codes of N rows, ascending codes M of the groups, names M) of a column of groups.

    Whole numbers are their own codes; texts are numbered in alphabetical order. Raises DataError
    for a negative number, which stands for a group that is not known.
    """
    values = np.asarray(named)
    found = np.unique(values)
    if values.dtype.kind in "iu":
        if found.min(initial=0) < 0:
            raise DataError(f"group {int(found[0])} is negative; groups count from 0")
        return values.astype(np.int64), found.astype(np.int64), tuple(str(v) for v in found)
    codes = np.searchsorted(found, values)
    return codes.astype(np.int64), np.arange(len(found)), tuple(str(v) for v in found)
