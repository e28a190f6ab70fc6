"""Which rows are reliable and which redundant: EATA's filter as a monitor, adapting nothing.

Niu et al. 2022, "Efficient test-time model adaptation without forgetting", ICML: a row is reliable
when the entropy of its probabilities is below E0 = 0.4 ln C, and a reliable one is redundant when
its probabilities point where those of the rows before it did: when their cosine with the moving
mean (momentum 0.9, by batches of 64) reaches a margin. Theirs is 0.05 for 1,000 classes. Sure
answers spread evenly over C classes have cosine 1/sqrt(C) with their mean, so theirs is 1.58 of it,
and that is taken for any C, but no more than half the way from 1/sqrt(C) to 1. A falling share of
reliable rows means harder ones; a rising share of redundant ones a stream that has narrowed to few
classes. Classes that were never even have redundant rows in a healthy stream too: compare with the
reference. Here the mean is of all reliable rows, so that no row decides about another of its batch,
and batches are of 64 reliable rows however they come.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from calibration.drift.saved import Saved, read, text_of
from posthoc.contract import F64, Array, DataError

NAME = "samples"
ENTROPY = 0.4  # of ln C
MARGIN = 0.05 * math.sqrt(1000)  # of 1/sqrt(C)
MOMENTUM = 0.9
BATCH = 64


@dataclass(frozen=True, slots=True)
class SampleTotals:
    """``n`` rows, of which ``reliable``, of which ``compared`` with rows before, of which
    ``redundant``.

    ``mean`` C is the moving mean, empty before the first whole batch; ``pending`` C sums the
    ``waiting`` reliable rows since.
    """

    pending: tuple[float, ...]
    mean: tuple[float, ...] = ()
    waiting: int = 0
    n: int = 0
    reliable: int = 0
    compared: int = 0
    redundant: int = 0

    @property
    def reliable_share(self) -> float:
        """Of all rows; nan for none."""
        return self.reliable / self.n if self.n else math.nan

    @property
    def redundant_share(self) -> float:
        """Of the reliable rows that had others before them; nan for none."""
        return self.redundant / self.compared if self.compared else math.nan


class _Saved(Saved):
    pending: tuple[float, ...]
    mean: tuple[float, ...]
    waiting: int
    n: int
    reliable: int
    compared: int
    redundant: int


def to_json(totals: SampleTotals) -> str:
    """One line of JSON, from which ``from_json`` makes equal totals, to the last bit."""
    return text_of(_Saved(detector=NAME, **asdict(totals)))


def from_json(text: str) -> SampleTotals:
    """The inverse of ``to_json``. Raises DataError for anything else."""
    totals = SampleTotals(**read(_Saved, NAME, text).model_dump(exclude={"detector", "version"}))
    if totals.mean and len(totals.mean) != len(totals.pending):
        raise DataError("the parts of saved totals of samples do not match: start anew")
    return totals


def redundant_from(n_classes: int) -> float:
    """The cosine from which a row is redundant."""
    even = 1 / math.sqrt(n_classes)
    return min(MARGIN * even, (1 + even) / 2)


def start(n_classes: int) -> SampleTotals:
    """No rows, for probabilities of ``n_classes`` classes."""
    return SampleTotals((0.0,) * n_classes)


def update(totals: SampleTotals, probs: Array) -> SampleTotals:
    """Totals with N more rows of probabilities, N×C, in the order of the stream.

    However the stream is cut, counts are the same but for a cosine within rounding of the margin.
    Raises DataError for another number of classes and a row that is not finite, naming it.
    """
    p = np.asarray(probs, np.float64)
    c = len(totals.pending)
    if p.ndim != 2 or p.shape[1] != c:
        raise DataError(f"probabilities of {c} classes have shape {p.shape}")
    bad = ~np.isfinite(p).all(axis=1)
    if bad.any():
        raise DataError(f"row {int(np.argmax(bad))}: a probability is not finite")
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)
    sure = p[entropy < ENTROPY * math.log(c)]
    margin = redundant_from(c)
    mean: F64 = np.asarray(totals.mean)
    pending, waiting = np.asarray(totals.pending), totals.waiting
    compared, redundant, first = totals.compared, totals.redundant, 0
    while first < len(sure):
        rows = sure[first : first + BATCH - waiting]
        first, waiting, pending = first + len(rows), waiting + len(rows), pending + rows.sum(axis=0)
        if len(mean):
            cosine = rows @ mean / (np.linalg.norm(rows, axis=1) * np.linalg.norm(mean))
            compared, redundant = compared + len(rows), redundant + int((cosine >= margin).sum())
        if waiting == BATCH:
            new = pending / BATCH
            mean = MOMENTUM * mean + (1 - MOMENTUM) * new if len(mean) else new
            pending, waiting = np.zeros(c), 0
    return SampleTotals(
        pending=tuple(pending.tolist()),
        mean=tuple(mean.tolist()),
        waiting=waiting,
        n=totals.n + len(p),
        reliable=totals.reliable + len(sure),
        compared=compared,
        redundant=redundant,
    )
