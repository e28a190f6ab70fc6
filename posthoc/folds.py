"""The fold protocol, and the log loss that every fit minimises.

A fold is a sum in disguise: ``init -> update(batch) -> merge(other) -> result`` over a small
state. Fits and additive metrics are folds, so that one pass over a file, a Ray worker's share and
a Prometheus counter all hold the same statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from posthoc.contract import F64, I64, Array, DataError

A = TypeVar("A")
S = TypeVar("S")
B = TypeVar("B")
R = TypeVar("R")

# Below the smallest normal float32 a runtime may flush to zero, so a zero says only "less than
# this"; the loss of one row is thereby at most 87.3 nats.
PROBABILITY_FLOOR = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Fold(Generic[S, B, R]):
    """Pure functions over a state S, batches B and a result R.

    ``update`` and ``merge`` return a new state; ``merge`` is associative and commutative with
    ``init()`` as its neutral element, so batches may be split and shared out in any way.
    """

    init: Callable[[], S]
    update: Callable[[S, B], S]
    merge: Callable[[S, S], S]
    result: Callable[[S], R]


def run(fold: Fold[S, B, R], batches: Iterable[B]) -> R:
    """The result of one pass over ``batches``; holds one batch and one state at a time."""
    state = fold.init()
    for batch in batches:
        state = fold.update(state, batch)
    return fold.result(state)


class Mapper(Protocol):
    """Runs a function over items in other processes; its results come in the order of the items.

    Function and items are sent there: they say where large arrays lie and do not hold them. What
    the function raises is raised here. Only a few items for each worker are drawn ahead.
    """

    @property
    def workers(self) -> int:
        """How many items are worked on at once, at most."""
        ...

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
        """The function's results, in the order of the items."""
        ...


def each(mapper: Mapper | None, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """The function's results in order, by ``mapper``; None: in this process."""
    return map(function, items) if mapper is None else mapper(function, items)


def log_softmax(z: Array) -> F64:
    """``z - logsumexp(z)`` over the last axis in float64; no overflow for any finite z."""
    centred = np.asarray(z, dtype=np.float64)
    centred = centred - centred.max(axis=-1, keepdims=True)
    log_probs: F64 = centred - np.log(np.exp(centred).sum(axis=-1, keepdims=True))
    return log_probs


def log_loss(z: Array, y: Array, *, temperature: Array | float = 1.0) -> F64:
    """Negative log-likelihood per row, in nats, of classes y (N) under ``softmax(z/temperature)``.

    ``z`` is N×C; ``temperature`` a scalar, one per row (N) or one per entry (N×C), positive.
    Raises DataError when a label is no class of z.
    """
    t = np.asarray(temperature, dtype=np.float64)
    log_probs = log_softmax(np.asarray(z, dtype=np.float64) / (t[:, None] if t.ndim == 1 else t))
    picked: F64 = log_probs[np.arange(len(log_probs)), class_index(y, log_probs.shape[1])]
    return -picked


def log_loss_of_probs(probs: Array, y: Array) -> F64:
    """Negative log-likelihood per row, in nats, of classes y (N) under ``probs`` (N×C).

    Probabilities count as at least PROBABILITY_FLOOR, the smallest normal float32.
    """
    p = np.asarray(probs, dtype=np.float64)
    picked = p[np.arange(len(p)), class_index(y, p.shape[1])]
    loss: F64 = -np.log(np.maximum(picked, PROBABILITY_FLOOR))
    return loss


def class_index(y: Array, n_classes: int) -> I64:
    """Labels as int64 indices below ``n_classes``; DataError naming the first row that is not."""
    labels = np.asarray(y)
    if labels.ndim != 1 or labels.dtype.kind not in "biu":
        raise DataError(f"labels are N class indices, not {labels.dtype} of shape {labels.shape}")
    index = labels.astype(np.int64)
    bad = np.flatnonzero((index < 0) | (index >= n_classes))
    if len(bad):
        raise DataError(
            f"row {bad[0]}: label {index[bad[0]]} is not a class index below {n_classes}"
        )
    return index
