"""What every detector does to a stream before it looks for changes: centre and scale it robustly.

A detector sees ``(x - median) / (1.4826 MAD)`` of a reference, dimension by dimension; outliers in
the reference hardly move either. After an alarm the detector learns the new regime: it collects
the next ``relearn`` observations, raising no alarm, takes their median and MAD, and watches on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from posthoc.contract import F64, Array, DataError

LEAST = 50  # reference points: below, the standard error of their median is above .18 spreads
RELEARN = 100
FARTHEST = 1e6  # spreads: beyond it an observation counts as this far, which keeps squares finite
NORMAL_MAD = 1.482602218505602  # 1 / the upper quartile of N(0, 1)
_ROUNDING = 1e-12  # of the largest value: a smaller spread is rounding

Observation: TypeAlias = float | Sequence[float] | Array
Row: TypeAlias = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """Centre and spread of D dimensions, in the units of the stream; DataError for spreads that
    are not above 0."""

    centre: Row
    spread: Row

    def __post_init__(self) -> None:
        if not self.centre or len(self.centre) != len(self.spread) or min(self.spread) <= 0:
            raise DataError("a scale is one centre, and one spread above 0, for each dimension")


def reference_of(points: Array) -> F64:
    """The reference N×D, from N or N×D numbers.

    Raises DataError for fewer than 50 points, another shape, and NaN or infinity.
    """
    try:
        x = np.asarray(points, np.float64)
    except (TypeError, ValueError) as e:
        raise DataError(f"the reference of a drift detector is no array of numbers: {e}") from e
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not x.shape[1]:
        raise DataError(f"the reference of a drift detector is N or N×D numbers, not {x.shape}")
    if len(x) < LEAST:
        raise DataError(
            f"the reference of a drift detector has {len(x)} points where {LEAST} are the least "
            "(about 200 are good): collect more before starting it"
        )
    bad = ~np.isfinite(x).all(axis=1)
    if bad.any():
        raise DataError(f"point {int(bad.argmax())} of the reference is NaN or infinite: drop it")
    return x


def scale_of(reference: F64, before: Scale | None = None) -> Scale:
    """Median and 1.4826 MAD of each column of N×D points.

    Where more than half of the points are equal, MAD is 0, and mean and standard deviation stand
    in: average such a stream (set sizes, errors) over windows first. A constant column keeps the
    spread that it had ``before``; without one DataError is raised, as it is for a spread that is
    no finite number.
    """
    centre, spread = [], []
    for d, x in enumerate(reference.T):
        with np.errstate(over="ignore", invalid="ignore"):
            middle = float(np.median(x))
            wide = NORMAL_MAD * float(np.median(np.abs(x - middle)))
            least = _ROUNDING * abs(middle)
            if wide <= least:
                wide = float(x.std())
                middle = float(x.mean()) if wide > least else middle
        if not math.isfinite(wide) or not math.isfinite(middle):
            raise DataError(f"dimension {d} of the reference spreads beyond what a float holds")
        if wide <= least:
            if before is None:
                raise DataError(
                    f"dimension {d} of the reference is constant ({middle}): a change of it needs "
                    "no detector, and its scale cannot be told; leave it out"
                )
            wide = before.spread[d]
        centre.append(middle)
        spread.append(wide)
    return Scale(tuple(centre), tuple(spread))


def observed(x: Observation, dims: int) -> Row:
    """One observation as D floats.

    Raises DataError for another number of them, NaN and infinity.
    """
    try:
        row = (float(x),) if isinstance(x, (float, int)) else tuple(map(float, np.ravel(x)))
    except (TypeError, ValueError) as e:
        raise DataError(f"the observation {x!r} is no number: {e}") from e
    if len(row) != dims:
        raise DataError(f"the observation has {len(row)} numbers where the stream has {dims}")
    if not all(map(math.isfinite, row)):
        raise DataError(f"the observation {x!r} is NaN or infinite: leave it out of the stream")
    return row


def standardised(scale: Scale, row: Row) -> list[float]:
    """``(x - centre) / spread``; infinite where that is beyond a float, so clip it."""
    return [(x - c) / s for x, c, s in zip(row, scale.centre, scale.spread, strict=True)]


def check_learning(learning: tuple[Row, ...] | None, dims: int, relearn: int) -> None:
    """That a saved state may hold these observations of a new regime; raises DataError."""
    if learning is not None and (
        len(learning) >= relearn or any(len(row) != dims for row in learning)
    ):
        raise DataError(
            f"the saved state holds {len(learning)} observations of a new regime that are no "
            f"{dims} numbers each, or as many as are needed ({relearn}): start the detector anew"
        )
