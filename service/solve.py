"""A batch of requests on the model: joined, run in slices, halved where it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Protocol

import numpy as np

from posthoc.contract import Array, HedgedError

Run = Callable[[Mapping[str, Array], Sequence[str]], dict[str, Array]]
Answer = dict[str, Array]


class Rows(Protocol):
    """The rows of one request, and which outputs of ``run`` it wants for them."""

    @property
    def run(self) -> Run: ...
    @property
    def feed(self) -> Mapping[str, Array]: ...
    @property
    def outputs(self) -> frozenset[str]: ...
    @property
    def rows(self) -> int: ...


class RowError(HedgedError):
    """One row alone makes the model fail; ``row`` counts from 0 within its own request."""

    def __init__(self, row: int, cause: Exception) -> None:
        super().__init__(f"row {row} cannot be computed: {cause}")
        self.row = row
        self.cause = cause


def solve(batch: Sequence[Rows], max_rows: int) -> list[Answer | Exception]:
    """Answers of works that share a signature, in order; an exception for each that fails alone.

    A failing batch is halved until the works that fail are alone, and such a work is halved until
    its first failing row is known.
    """
    names = _names(batch)
    try:
        feed = batch[0].feed
        if len(batch) > 1:
            feeds = [work.feed for work in batch]
            feed = {key: np.concatenate(list(map(itemgetter(key), feeds))) for key in feed}
        whole = _run(batch[0].run, feed, names, max_rows)
    except Exception as e:  # whatever the model raises must reach only the request it belongs to
        if len(batch) > 1:
            half = len(batch) // 2
            return solve(batch[:half], max_rows) + solve(batch[half:], max_rows)
        try:
            return [_row_by_row(batch[0], names, 0, batch[0].rows, e, max_rows)]
        except RowError as bad:
            return [bad]
    if len(batch) == 1:
        return [whole]
    answers: list[Answer | Exception] = []
    end = 0
    for work in batch:
        start, end = end, end + work.rows
        answers.append({name: value[start:end] for name, value in whole.items()})
    return answers


def _names(batch: Sequence[Rows]) -> Sequence[str]:
    """The outputs that any of a batch wants, in one order."""
    first = batch[0].outputs
    if any(work.outputs != first for work in batch):
        first = first.union(*(work.outputs for work in batch))
    return _ordered(first)


@lru_cache(maxsize=256)  # requests ask for the same again and again
def _ordered(names: frozenset[str]) -> tuple[str, ...]:
    """Names sorted."""
    return tuple(sorted(names))


def _run(run: Run, feed: Mapping[str, Array], names: Sequence[str], max_rows: int) -> Answer:
    """One run, in slices where the feed is longer than ``max_rows``; checks the answer's rows."""
    rows = len(next(iter(feed.values())))
    if rows > max_rows:
        parts = [
            _run(run, _rows(feed, at, at + max_rows), names, max_rows)
            for at in range(0, rows, max_rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    answer = run(feed, names)
    for name, value in answer.items():
        if value.shape[:1] != (rows,):
            raise ValueError(f"output {name!r} has shape {value.shape} for {rows} rows")
    return answer


def _row_by_row(
    work: Rows, names: Sequence[str], low: int, high: int, error: Exception, max_rows: int
) -> Answer:
    """Rows low to high, which failed together with ``error``; RowError at the first that fails."""
    if high - low == 1:
        raise RowError(low, error) from error
    middle = (low + high) // 2
    parts = []
    for start, end in ((low, middle), (middle, high)):
        try:
            parts.append(_run(work.run, _rows(work.feed, start, end), names, max_rows))
        except Exception as e:
            parts.append(_row_by_row(work, names, start, end, e, max_rows))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(feed: Mapping[str, Array], start: int, end: int) -> dict[str, Array]:
    return {name: value[start:end] for name, value in feed.items()}
