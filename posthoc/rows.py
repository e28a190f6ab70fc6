"""The rows that a module is fitted on: blocks that can be read again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from posthoc.contract import Array, Features, FitError, Info, Task

BLOCK = 4096
HELD_OUT = (
    5  # one row in so many, where a page chooses a setting on rows its posterior has not seen
)


@dataclass(frozen=True, slots=True)
class Rows:
    """``n`` rows as blocks of `Features`; iterating reads them anew, in the same order."""

    blocks: Callable[[], Iterator[Features]]
    n: int

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

        def kept() -> Iterator[Features]:
            for block in self.blocks():
                index = np.arange(len(block))
                yield take(block, index % every != every - 1)

        parts = [take(b, slice(every - 1, None, every)) for b in self.blocks()]
        held = join(parts)
        return Rows(kept, self.n - len(held)), held


def of(rows: Features, size: int = BLOCK) -> Rows:
    """Rows in memory, as blocks of at most ``size``."""

    def blocks() -> Iterator[Features]:
        for i in range(0, len(rows), size):
            yield take(rows, slice(i, i + size))

    return Rows(blocks, len(rows))


def check(rows: Rows, info: Info, task: Task) -> None:
    """One pass over the rows before a fit, so that no page has to look.

    Raises FitError, naming the module, for no rows, features it needs and the model does not give,
    numbers that are not finite, features that are all zero, and labels that it needs and that are
    absent, of another shape than the outputs, or no class of theirs.
    """
    name, n, anything = info.name, 0, False
    for block in rows:
        n += len(block)
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
    if n == 0:
        raise FitError(f"{name} was given no rows")
    if "features" in info.needs and not anything:
        raise FitError(f"{name}: every feature is zero on the given rows")


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
