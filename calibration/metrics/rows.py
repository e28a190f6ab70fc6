"""What figures of (confidence, right) and of (probabilities, class) ask of their rows."""

from __future__ import annotations

import numpy as np

from posthoc.contract import F64, I64, Array, DataError
from posthoc.folds import class_index

ROUNDING = 1e-6  # a float32 softmax may sum to a hair above 1
SUM_ROUNDING = 1e-3  # and one in float16 to within 2^-11 of 1


def rated(confidence: Array, right: Array, *, least: int = 1) -> tuple[F64, F64]:
    """N confidences in [0, 1] and N outcomes, 1 where the label was right and else 0, as float64.

    Raises DataError for fewer than ``least`` rows, lengths that differ, a confidence that is NaN
    or outside [0, 1], and an outcome that is neither 0 nor 1, naming the row.
    """
    c, hit = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    if c.ndim != 1 or c.shape != hit.shape:
        raise DataError(f"confidence has shape {c.shape} where right has {hit.shape}; both are N")
    if len(c) < least:
        raise DataError(f"a calibration error needs at least {least} row and there is none")
    bad = np.flatnonzero(~((c >= -ROUNDING) & (c <= 1 + ROUNDING)))
    if len(bad):
        raise DataError(f"row {bad[0]}: confidence {c[bad[0]]} lies outside [0, 1]")
    bad = np.flatnonzero((hit != 0) & (hit != 1))
    if len(bad):
        raise DataError(f"row {bad[0]}: right is {hit[bad[0]]}, neither 0 nor 1")
    return np.clip(c, 0.0, 1.0), hit


def class_probabilities(probs: Array, y: Array, n_classes: int) -> tuple[Array, I64]:
    """N×C probabilities as they came, and N class indices.

    Raises DataError for shapes that do not match, a label that is no class, and a row that is
    NaN, has an entry outside [0, 1] or does not sum to 1 within ``SUM_ROUNDING``, naming it.
    """
    p = np.asarray(probs)
    if p.ndim != 2 or p.shape[1] != n_classes or len(p) != len(y):
        raise DataError(f"probs have shape {p.shape} for {len(y)} labels of {n_classes} classes")
    if p.size:
        # Sums first: NaN and infinity show there, so that one look at each entry is enough.
        total = p.sum(axis=1, dtype=np.float64)
        bad = np.flatnonzero(~(np.abs(total - 1) <= SUM_ROUNDING))
        if len(bad):
            raise DataError(f"row {bad[0]}: probabilities sum to {total[bad[0]]:.6g} and not to 1")
        if p.min() < -ROUNDING:
            row = int(np.argmin(p.min(axis=1)))
            raise DataError(f"row {row}: probability {p[row].min()} lies outside [0, 1]")
    return p, class_index(y, n_classes)
