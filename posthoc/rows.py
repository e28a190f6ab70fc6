"""The rows that a module is fitted on: blocks that can be read again and again.

A sum over rows is taken a share at a time and the shares' sums are merged in their order. Shares
depend on the rows alone, never on how many workers there are, so neither do the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from typing import TypeVar

import numpy as np

from posthoc.contract import Array, Features, FitError, Info, Task
from posthoc.folds import Mapper, each

S = TypeVar("S")
# Reads some rows, block by block, each time it is called.
Share = Callable[[], Iterable[Features]]

BLOCK = 4096
SHARE = 16 * BLOCK  # rows of a share: seconds of work where there are many features
HELD_OUT = (
    5  # one row in so many, where a page chooses a setting on rows its posterior has not seen
)


@dataclass(frozen=True, slots=True)
class Rows:
    """``n`` rows as blocks of `Features`; iterating reads them anew, in the same order. ``shares``
    are the same blocks in parts that can be sent to another process; none where they cannot."""

    blocks: Callable[[], Iterator[Features]]
    n: int
    shares: tuple[Share, ...] = ()

    def __iter__(self) -> Iterator[Features]:
        return self.blocks()

    def shuffled(self, rng: np.random.Generator, size: int) -> Iterator[Features]:
        """Mini-batches of at most ``size`` rows in random order within each block: one epoch."""
        for block in self.blocks():
            order = rng.permutation(len(block))
            for i in range(0, len(block), size):
                yield take(block, order[i : i + size])

    def hold_out(self, every: int = HELD_OUT) -> tuple[Rows, Features]:
        """(the other rows, every ``every``-th row of each block)."""

        held = join([take(b, slice(every - 1, None, every)) for b in self.blocks()])
        kept = tuple(partial(_kept, share, every) for share in self.shares)
        return Rows(partial(_kept, self.blocks, every), self.n - len(held), kept), held

    def unlabelled(self) -> Rows:
        """The rows without their labels."""
        shares = tuple(partial(_unlabelled, share) for share in self.shares)
        return Rows(partial(_unlabelled, self.blocks), self.n, shares)


def _kept(share: Share, every: int) -> Iterator[Features]:
    for block in share():
        yield take(block, np.arange(len(block)) % every != every - 1)


def _unlabelled(share: Share) -> Iterator[Features]:
    return map(unlabelled, share())


def _cut(rows: Features, size: int) -> Iterator[Features]:
    for i in range(0, len(rows), size):
        yield take(rows, slice(i, i + size))


def of(rows: Features, size: int = BLOCK) -> Rows:
    """Rows in memory, as blocks of at most ``size``."""
    length = max(size, SHARE // size * size)
    parts = (take(rows, slice(i, i + length)) for i in range(0, len(rows), length))
    return Rows(
        partial(_cut, rows, size), len(rows), tuple(partial(_cut, part, size) for part in parts)
    )


def shared(shares: Sequence[Share], n: int) -> Rows:
    """The ``n`` rows of shares, one after the other."""
    return Rows(lambda: chain.from_iterable(share() for share in shares), n, tuple(shares))


def fold(
    init: Callable[[Features], S],
    update: Callable[[S, Features], S],
    merge: Callable[[S, S], S],
    rows: Sequence[Rows],
    mapper: Mapper | None = None,
) -> S | None:
    """The statistic of rows: that of each share, on whatever workers there are, merged in order.
    ``init`` is shown the first block of a share; None for no rows.
    """
    states: list[Iterator[S | None]] = []
    for part in rows:
        shares = part.shares or (part.blocks,)
        by = mapper if part.shares else None  # what is no share stays in this process
        states.append(each(by, partial(_statistic, init, update), shares))
    found = (s for s in chain.from_iterable(states) if s is not None)
    first = next(found, None)
    return None if first is None else reduce(merge, found, first)


def _statistic(
    init: Callable[[Features], S], update: Callable[[S, Features], S], share: Share
) -> S | None:
    stats: S | None = None
    for block in share():
        stats = update(init(block) if stats is None else stats, block)
    return stats


def check(rows: Rows, info: Info, task: Task, mapper: Mapper | None = None) -> None:
    """One pass over the rows before a fit, so that no page has to look.

    Raises FitError, naming the module, for no rows, features it needs and the model does not give,
    numbers that are not finite, features that are all zero, and labels that it needs and that are
    absent, of another shape than the outputs, or no class of theirs.
    """
    name = info.name
    seen = fold(_unseen, partial(_seen, info, task), _both, [rows], mapper) or (0, False)
    if seen[0] == 0:
        raise FitError(f"{name} was given no rows")
    if "features" in info.needs and not seen[1]:
        raise FitError(f"{name}: every feature is zero on the given rows")


def _unseen(block: Features) -> tuple[int, bool]:
    del block
    return 0, False


def _both(a: tuple[int, bool], b: tuple[int, bool]) -> tuple[int, bool]:
    return a[0] + b[0], a[1] or b[1]


def _seen(info: Info, task: Task, seen: tuple[int, bool], block: Features) -> tuple[int, bool]:
    """(rows so far, whether a feature is not zero); FitError for what no page can use."""
    name, anything = info.name, seen[1]
    if "features" in info.needs:
        if block.phi is None:
            raise FitError(f"{name} needs features; this model is a black box")
        if not np.isfinite(block.phi).all():
            raise FitError(f"{name} met features that are not finite")
        anything = anything or bool(block.phi.any())
    if not np.isfinite(block.z).all():
        raise FitError(f"{name} met outputs that are not finite")
    if "labels" in info.needs:
        _check_labels(name, block, task)
    return seen[0] + len(block), anything


def _check_labels(name: str, block: Features, task: Task) -> None:
    if block.y is None:
        raise FitError(f"{name} needs labels: name their column with --target")
    y = np.asarray(block.y)
    if task == "regression":
        if y.shape != block.z.shape:
            raise FitError(f"{name} met labels of shape {y.shape} for outputs {block.z.shape}")
        if not np.isfinite(y).all():
            raise FitError(f"{name} met labels that are not finite")
        return
    if y.ndim != 1 or y.dtype.kind not in "biu":
        raise FitError(f"{name} needs labels that are class indices, not {y.dtype} {y.shape}")
    if len(y) and (y.min() < 0 or y.max() >= block.z.shape[1]):
        bad = y[(y < 0) | (y >= block.z.shape[1])][0]
        raise FitError(f"{name} met the label {bad}, which is no class below {block.z.shape[1]}")


def take(rows: Features, index: Array | slice) -> Features:
    """Some of the rows."""
    return Features(
        None if rows.phi is None else rows.phi[index],
        rows.z[index],
        None if rows.y is None else rows.y[index],
    )


def unlabelled(rows: Features) -> Features:
    """The rows without their labels."""
    return Features(rows.phi, rows.z)


def join(parts: list[Features]) -> Features:
    """Blocks as one; every block has labels and features, or none has."""
    first = parts[0]
    return Features(
        None if first.phi is None else np.concatenate([p.phi for p in parts if p.phi is not None]),
        np.concatenate([p.z for p in parts]),
        None if first.y is None else np.concatenate([p.y for p in parts if p.y is not None]),
    )
