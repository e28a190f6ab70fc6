"""R-AUROC: does an uncertainty tell which rows have a stranger for a neighbour, labels unseen?

Kirchhof, Mucsányi, Oh & Kasneci 2023, "URL: a representation learning benchmark for transferable
uncertainty estimates" (NeurIPS datasets and benchmarks). A row is right where its nearest other row
by cosine has its label. It is exact and needs every row at once; memory is N×D and a bounded
block, time N²D.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.metrics.ranking import auroc
from posthoc.contract import F64, I64, Array, DataError

_HELD = 1 << 23  # similarities held at a time
_TIE = 1e-12  # copies of a row are equally near, whatever the order of the sums was


@dataclass(frozen=True, slots=True)
class Retrieval:
    """``r_auroc`` of an uncertainty, and ``recall_at_1``: the share of rows that are right."""

    r_auroc: float
    recall_at_1: float


def nearest(embeddings: Array) -> I64:
    """Of each of N embeddings (N×D) the other row whose cosine with it is largest.

    Of several within 1e-12 it is the first. Raises DataError for fewer than two rows, and for a row
    that is not finite or has length 0.
    """
    unit = _unit(embeddings)
    found = np.empty(len(unit), np.int64)
    step = max(1, _HELD // len(unit))
    for start in range(0, len(unit), step):
        block = unit[start : start + step] @ unit.T
        own = np.arange(len(block))
        block[own, start + own] = -np.inf
        found[start : start + step] = (block >= block.max(axis=1, keepdims=True) - _TIE).argmax(1)
    return found


def recall_at_1(embeddings: Array, labels: Array) -> float:
    """Share of N rows whose `nearest` other row has their label (N, of any type).

    A row whose label no other has is wrong whatever its embedding. Raises DataError as `nearest`
    does, for labels of another number of rows, and for one that is NaN.
    """
    return float(_right(embeddings, labels).mean())


def retrieval(uncertainty: Array, embeddings: Array, labels: Array) -> Retrieval:
    """R-AUROC: P(a wrong row is less certain than a right one), ties of N uncertainties (larger is
    less certain) counting half; .5 is chance.

    Raises DataError as `recall_at_1` does, for an uncertainty that is NaN, and where all rows are
    right or all are wrong.
    """
    right = _right(embeddings, labels)
    doubt = np.asarray(uncertainty, np.float64)
    if doubt.shape != right.shape:
        raise DataError(f"uncertainty has shape {doubt.shape} where there are {len(right)} rows")
    if np.isnan(doubt).any():
        raise DataError(f"uncertainty: row {int(np.isnan(doubt).argmax())} is NaN")
    if right.all() or not right.any():
        raise DataError(
            f"R-AUROC needs rows of both kinds: the nearest neighbours of {right.sum()} of "
            f"{len(right)} rows have their label"
        )
    return Retrieval(auroc(doubt[right], doubt[~right]), float(right.mean()))


def _right(embeddings: Array, labels: Array) -> NDArray[np.bool_]:
    y = np.asarray(labels)
    if y.ndim != 1 or len(y) != len(embeddings):
        raise DataError(f"labels have shape {y.shape} where there are {len(embeddings)} rows")
    if y.dtype.kind == "f" and np.isnan(y).any():
        raise DataError(f"labels: row {int(np.isnan(y).argmax())} is NaN")
    right: NDArray[np.bool_] = y[nearest(embeddings)] == y
    return right


def _unit(embeddings: Array) -> F64:
    x = np.array(embeddings, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise DataError(f"a nearest neighbour needs two rows N×D or more, not shape {x.shape}")
    top = np.abs(x).max(axis=1, initial=0.0)
    if not np.isfinite(top).all():
        raise DataError(f"embeddings: row {int(np.argmin(np.isfinite(top)))} is not finite")
    if not top.all():
        raise DataError(f"embeddings: row {int(np.argmin(top))} has length 0, and so no direction")
    x /= top[:, None]  # no square over- or underflows
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x
