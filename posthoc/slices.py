"""Rows a few at a time, where what a model holds inside of all of them would fill the memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from posthoc.contract import Array

MOST_BYTES = 1 << 29
"""Of what a model holds inside of the rows of one run, as `posthoc.model.memory` measures it. ONNX
Runtime takes up to about twice as much: its arena grows by powers of two."""


def most_rows(row_bytes: float | None) -> int:
    """Rows of one run, of so many bytes each: at least one; any number where that is not known."""
    return sys.maxsize if row_bytes is None else max(1, int(MOST_BYTES // max(1.0, row_bytes)))


def in_slices(
    run: Callable[[Mapping[str, Array]], Sequence[Array]], feed: Mapping[str, Array], most: int
) -> list[Array]:
    """What ``run`` gives for the rows of ``feed``, at most so many of them at once.

    An array of one row stands for all rows where others have more. Every output has a row for each.
    """
    rows = max((len(v) for v in feed.values()), default=0)
    if rows <= most:
        return list(run(feed))
    parts = [
        run({k: v[at : at + most] if len(v) == rows else v for k, v in feed.items()})
        for at in range(0, rows, most)
    ]
    return [np.concatenate(values) for values in zip(*parts, strict=True)]
