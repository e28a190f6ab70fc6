"""The greedy batcher: when the device is free it takes everything that waits, up to a limit.

One batcher and one thread per device. Requests of several models and bundle versions wait in one
queue bounded in rows; those that call the same function with tensors of the same trailing shapes
share a batch, so images of two sizes do not. A run of the model is bounded in rows and in bytes. A
batch that fails is bisected, so that only the bad row's request fails.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic

import numpy as np

from posthoc.contract import Array, HedgedError
from service import instruments
from service.errors import ServiceError, overloaded

Run = Callable[[Mapping[str, Array], Sequence[str]], dict[str, Array]]
Answer = dict[str, Array]


class RowError(HedgedError):
    """One row alone makes the model fail; ``row`` counts from 0 within its own request."""

    def __init__(self, row: int, cause: Exception) -> None:
        super().__init__(f"row {row} cannot be computed: {cause}")
        self.row = row
        self.cause = cause


@dataclass(eq=False, slots=True)
class Work:
    """One request's rows, from joining the queue to its answer in ``future``. ``row_bytes``: of a
    row and its answer."""

    run: Run
    feed: Mapping[str, Array]
    outputs: frozenset[str]
    rows: int
    row_bytes: int
    future: asyncio.Future[Answer]
    joined: float
    waiting: bool = True
    signature: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.signature = (
            self.run,
            *((name, a.dtype.char, a.shape[1:]) for name, a in self.feed.items()),
        )


class Batcher:
    """Runs queued work on one device. Used from one event loop; computes in one thread.

    ``max_batch_rows`` and ``max_batch_bytes`` (of rows and their answers) bound one run of the
    model, which has at least one row; ``max_queue_rows`` what may wait. ``max_delay`` (seconds)
    lets an idle device wait for a fuller batch; 0 never waits.
    """

    def __init__(
        self,
        *,
        max_batch_rows: int,
        max_queue_rows: int,
        max_batch_bytes: int = sys.maxsize,
        max_delay: float = 0.0,
    ) -> None:
        self.max_batch_rows = max_batch_rows
        self.max_batch_bytes = max_batch_bytes
        self.max_queue_rows = max_queue_rows
        self.max_delay = max_delay
        self.queued_rows = 0
        self._queue: deque[Work] = deque()
        self._busy = False
        self._closed = False
        self._wake: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")

    def submit(
        self,
        run: Run,
        feed: Mapping[str, Array],
        outputs: frozenset[str],
        *,
        timeout: float,
        row_bytes: int = 0,
    ) -> Work:
        """Queue the rows of ``feed``: arrays that share axis 0, rows already validated.

        ``row_bytes`` is what a row and its answer take together, about.
        ``work.future`` gets the answer, or: RowError for a row that fails by itself; ServiceError
        504 when ``timeout`` seconds passed. Cancelling it takes the work out of the queue. Raises
        ServiceError 503 at once when the rows do not fit into the queue.
        """
        rows = len(next(iter(feed.values())))
        if self._closed:
            raise overloaded("the server is stopping")
        # An idle device takes any request; the bound is on what has to wait behind others.
        if (self._busy or self._queue) and self.queued_rows + rows > self.max_queue_rows:
            raise overloaded(f"{self.queued_rows} rows are waiting for the model", "queue_full")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        work = Work(run, feed, outputs, rows, row_bytes, future, monotonic())
        timer = loop.call_later(timeout, _expire, work, timeout)
        work.future.add_done_callback(lambda _: self._left(work, timer))
        self._queue.append(work)
        self.queued_rows += rows
        self._dispatch()
        if work.waiting:
            instruments.set_queue_rows(self.queued_rows)
        return work

    async def close(self) -> None:
        """Refuse new work, fail what waits, and wait for the batch on the device."""
        self._closed = True
        for work in list(self._queue):
            if not work.future.done():
                work.future.set_exception(overloaded("the server is stopping"))
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def _left(self, work: Work, timer: asyncio.TimerHandle) -> None:
        """The work is answered, late or cancelled: it must not be computed any more."""
        timer.cancel()
        if work.waiting:
            self._queue.remove(work)
            self._unqueue(work)
            instruments.set_queue_rows(self.queued_rows)

    def _unqueue(self, work: Work) -> None:
        work.waiting = False
        self.queued_rows -= work.rows

    def _dispatch(self) -> None:
        """Start the next batch if the device is free and there is one."""
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        if self._busy or not self._queue or self._closed:
            return
        if self.max_delay and self.queued_rows < self._room(self._queue[0].row_bytes):
            due = self._queue[0].joined + self.max_delay - monotonic()
            if due > 0:
                self._wake = asyncio.get_running_loop().call_later(due, self._dispatch)
                return
        if batch := self._take():
            self._busy = True
            instruments.set_queue_rows(self.queued_rows)
            self._thread.submit(self._compute, batch, asyncio.get_running_loop())

    def _take(self) -> list[Work]:
        """The oldest live work and all that can share its batch, in order of arrival."""
        batch: list[Work] = []
        passed: list[Work] = []
        rows = heaviest = 0
        while self._queue and rows < self._room(heaviest):
            work = self._queue.popleft()
            heavier = max(heaviest, work.row_bytes)
            if work.future.done():
                self._unqueue(work)
            elif batch and (
                work.signature != batch[0].signature or rows + work.rows > self._room(heavier)
            ):
                passed.append(work)
            else:
                self._unqueue(work)
                batch.append(work)
                rows += work.rows
                heaviest = heavier
        self._queue.extendleft(reversed(passed))
        return batch

    def _room(self, row_bytes: int) -> int:
        """Rows of so many bytes that one run may have."""
        return max(1, min(self.max_batch_rows, self.max_batch_bytes // max(1, row_bytes)))

    def _compute(self, batch: list[Work], loop: asyncio.AbstractEventLoop) -> None:
        """In the device's thread: answer a batch and hand the answers back to the loop."""
        start = monotonic()
        answers = solve(batch, self._room(max(work.row_bytes for work in batch)))
        seconds = monotonic() - start
        loop.call_soon_threadsafe(self._finish, batch, answers, start, seconds)

    def _finish(
        self, batch: list[Work], answers: list[Answer | Exception], start: float, seconds: float
    ) -> None:
        self._busy = False
        self._dispatch()  # the device works on while the answers go out
        for work, answer in zip(batch, answers, strict=True):
            if work.future.done():
                continue
            if isinstance(answer, Exception):
                work.future.set_exception(answer)
            else:
                work.future.set_result(answer)
            instruments.observe_stage("queue", start - work.joined)
        instruments.observe_stage("model", seconds)
        instruments.observe_batch(sum(work.rows for work in batch))


def _expire(work: Work, timeout: float) -> None:
    if not work.future.done():
        where = "waiting for the model" if work.waiting else "in the model"
        work.future.set_exception(
            ServiceError(504, "timeout", f"no answer after {timeout:g} s, {where}")
        )


def solve(batch: Sequence[Work], max_rows: int) -> list[Answer | Exception]:
    """Answers of works that share a signature, in order; an exception for each that fails alone.

    A failing batch is halved until the works that fail are alone, and such a work is halved until
    its first failing row is known.
    """
    names = sorted(frozenset[str]().union(*(work.outputs for work in batch)))
    try:
        feed = {
            key: value if len(batch) == 1 else np.concatenate([work.feed[key] for work in batch])
            for key, value in batch[0].feed.items()
        }
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
    work: Work, names: Sequence[str], low: int, high: int, error: Exception, max_rows: int
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
