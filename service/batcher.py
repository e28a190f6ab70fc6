"""The greedy batcher: when the device is free it takes everything that waits, up to a limit.

One batcher and one thread per device. Requests of several models and bundle versions wait in one
queue bounded in rows; those that call the same function with tensors of the same trailing shapes
share a batch, so images of two sizes do not. A run of the model is bounded in rows and in bytes;
requests to models that gain nothing by more rows share smaller ones (`service.run_rows`). A batch
that fails is bisected, so that only the bad row's request fails. A batch that is known to be quick
is computed on the event loop itself, while the device's thread is idle.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from time import monotonic

from posthoc.contract import Array
from service import instruments
from service.errors import ServiceError, overloaded
from service.later import Later
from service.pace import Pace
from service.solve import Answer, Run, solve


@dataclass(eq=False, slots=True)
class Work:
    """One request's rows, from joining the queue to its answer in ``future``.

    ``row_bytes``: of a row and its answer; ``most``: rows beyond which others are not joined;
    ``values``: in all inputs; ``waits`` is called once with the work if it has to wait for others.
    """

    run: Run
    feed: Mapping[str, Array]
    outputs: frozenset[str]
    rows: int
    values: int
    row_bytes: int
    most: int
    timeout: float
    pace: Pace | None
    waits: Callable[[Work], None] | None
    future: asyncio.Future[Answer]
    joined: float
    waiting: bool = True

    @property
    def due(self) -> float:
        """When it is late, by the monotonic clock."""
        return self.joined + self.timeout

    def shares(self, other: Work) -> bool:
        """Whether the rows of both may be in one run."""
        return (
            self.run == other.run
            and self.feed.keys() == other.feed.keys()
            and all(
                a.shape[1:] == other.feed[name].shape[1:] and a.dtype == other.feed[name].dtype
                for name, a in self.feed.items()
            )
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
        later: Later | None = None,
    ) -> None:
        self.max_batch_rows = max_batch_rows
        self.max_batch_bytes = max_batch_bytes
        self.max_queue_rows = max_queue_rows
        self.max_delay = max_delay
        self.queued_rows = 0
        self._queue: deque[Work] = deque()
        self._fresh: list[Work] = []  # joined since the last dispatch
        self._busy = False
        self._closed = False
        self._wake: asyncio.Handle | None = None  # the next dispatch
        self._later = later or Later()
        self._open: dict[Work, None] = {}  # what is not answered, but for this turn of the loop
        self._timer: asyncio.TimerHandle | None = None
        self._alarm = inf  # when it goes off
        self._told = 0  # rows that the metric has
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")

    def submit(
        self,
        run: Run,
        feed: Mapping[str, Array],
        outputs: frozenset[str],
        *,
        timeout: float,
        row_bytes: int = 0,
        most: int | None = None,
        pace: Pace | None = None,
        waits: Callable[[Work], None] | None = None,
    ) -> Work:
        """Queue the rows of ``feed``: arrays that share axis 0, rows already validated.

        ``row_bytes`` is what a row and its answer take together, about; no other
        request joins a run of ``most`` rows; ``pace`` learns how long
        ``run`` takes; ``waits`` is called once with the work if it has to wait for others.
        ``work.future`` gets the answer, or: RowError for a row that fails by itself; ServiceError
        504 when ``timeout`` seconds passed. `drop` takes the work back. Raises ServiceError 503 at
        once when the rows do not fit into the queue.
        """
        rows, values = len(next(iter(feed.values()))), sum([v.size for v in feed.values()])
        if self._closed:
            raise overloaded("the server is stopping")
        # An idle device takes any request; the bound is on what has to wait behind others.
        if (self._busy or self._queue) and self.queued_rows + rows > self.max_queue_rows:
            raise overloaded(f"{self.queued_rows} rows are waiting for the model", "queue_full")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        work = Work(
            *(run, feed, outputs, rows, values, row_bytes, most or self.max_batch_rows),
            *(timeout, pace, waits),
            *(future, monotonic()),
        )
        self._queue.append(work)
        self._fresh.append(work)
        self.queued_rows += rows
        if len(self._fresh) == 1:
            # Not at once: other requests that have come are about to join.
            self._wake_by(loop.call_soon(self._dispatch))
        return work

    async def close(self) -> None:
        """Refuse new work, fail what waits, and wait for the batch on the device."""
        self._closed = True
        for work in list(self._queue):
            self._leave(work)
            if not work.future.done():
                work.future.set_exception(overloaded("the server is stopping"))
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def drop(self, work: Work) -> None:
        """Nobody wants the answer any more: a work that waits is never computed."""
        self._leave(work)
        work.future.cancel()

    def _hold(self, work: Work) -> None:
        """Bound the time of a work that is not answered in this turn of the loop."""
        self._open[work] = None
        self._expire_at(work.due)
        if work.waiting and work.waits is not None:
            work.waits(work)

    def _expire_at(self, due: float) -> None:
        """See that somebody looks at the time then. One timer serves all works."""
        if due >= self._alarm:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._alarm = due
        delay = max(0.0, due - monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    def _expire(self) -> None:
        """Fail every work that is late."""
        self._timer, self._alarm = None, inf
        now = monotonic()
        for work in [work for work in self._open if work.due <= now]:
            where = "waiting for the model" if work.waiting else "in the model"
            self._leave(work)
            if not work.future.done():
                work.future.set_exception(
                    ServiceError(504, "timeout", f"no answer after {work.timeout:g} s, {where}")
                )
        if self._open:
            self._expire_at(min(work.due for work in self._open))

    def _leave(self, work: Work) -> None:
        """The work is answered, late or not wanted: it must not be computed any more."""
        self._open.pop(work, None)
        if work.waiting:
            self._queue.remove(work)
            self._unqueue(work)

    def _unqueue(self, work: Work) -> None:
        work.waiting = False
        self.queued_rows -= work.rows

    def _wake_by(self, handle: asyncio.Handle | None) -> None:
        if self._wake is not None:
            self._wake.cancel()
        self._wake = handle

    def _dispatch(self) -> None:
        """Start the next batch if the device is free and there is one."""
        self._wake_by(None)
        loop = asyncio.get_running_loop()
        batch: list[Work] = []
        if self._queue and not (self._busy or self._closed):
            due = self._due()
            if due > 0:
                self._wake_by(loop.call_later(due, self._dispatch))
            else:
                batch = self._take()
        quick = _is_quick(batch)
        fresh, self._fresh = self._fresh, []
        for work in fresh:
            if (work.waiting or not quick) and not work.future.done():
                self._hold(work)
        if self.queued_rows != self._told:
            self._told = self.queued_rows
            self._later.add(instruments.set_queue_rows, self._told)
        if not batch:
            return
        if quick:
            self._deliver(batch, *self._timed(batch))
            if self._queue:  # others on the loop have their turn first
                self._wake_by(loop.call_soon(self._dispatch))
        else:
            self._busy = True
            self._thread.submit(self._compute, batch, loop)

    def _due(self) -> float:
        """Seconds that an idle device still waits for a fuller batch."""
        first = self._queue[0]
        if not self.max_delay or self.queued_rows >= self._room(first.most, first.row_bytes):
            return 0.0
        return first.joined + self.max_delay - monotonic()

    def _take(self) -> list[Work]:
        """The oldest live work and all that can share its batch, in order of arrival."""
        batch: list[Work] = []
        passed: list[Work] = []
        rows = heaviest = 0
        most = self.max_batch_rows
        while self._queue and rows < self._room(most, heaviest):
            work = self._queue.popleft()
            heavier = max(heaviest, work.row_bytes)
            if work.future.done():
                self._unqueue(work)
            elif batch and not (
                work.shares(batch[0]) and rows + work.rows <= self._room(most, heavier)
            ):
                passed.append(work)
            else:
                self._unqueue(work)
                batch.append(work)
                most = work.most  # that of the others, too
                rows += work.rows
                heaviest = heavier
        self._queue.extendleft(reversed(passed))
        return batch

    def _room(self, most: int, row_bytes: int) -> int:
        """Rows of so many bytes that one run may have, of a model that may have ``most``."""
        room = min(most, self.max_batch_rows, self.max_batch_bytes // max(1, row_bytes))
        return max(1, room)

    def _compute(self, batch: list[Work], loop: asyncio.AbstractEventLoop) -> None:
        """In the device's thread: answer a batch and hand the answers back to the loop."""
        loop.call_soon_threadsafe(self._finish, batch, *self._timed(batch))

    def _timed(self, batch: list[Work]) -> tuple[list[Answer | Exception], float, float]:
        """The answers, when they were begun, and the seconds that they took."""
        start = monotonic()
        # `most` bounds what is joined and slices no request: what a client sends together keeps
        # the bits of that shape.
        room = self._room(self.max_batch_rows, max([work.row_bytes for work in batch]))
        answers = solve(batch, room)
        return answers, start, monotonic() - start

    def _finish(
        self, batch: list[Work], answers: list[Answer | Exception], start: float, seconds: float
    ) -> None:
        self._busy = False
        if self._queue:
            self._dispatch()  # the device works on while the answers go out
        self._deliver(batch, answers, start, seconds)

    def _deliver(
        self, batch: list[Work], answers: list[Answer | Exception], start: float, seconds: float
    ) -> None:
        for work, answer in zip(batch, answers, strict=True):
            self._open.pop(work, None)
            if work.future.done():
                continue
            if isinstance(answer, Exception):
                work.future.set_exception(answer)
            else:
                work.future.set_result(answer)
        if (pace := batch[0].pace) is not None:
            pace.note(sum([work.values for work in batch]), seconds)
        rows, queued = sum([w.rows for w in batch]), [start - work.joined for work in batch]
        self._later.add(instruments.observe_batches, (rows, queued, seconds))


def _is_quick(batch: Sequence[Work]) -> bool:
    return (
        bool(batch)
        and (pace := batch[0].pace) is not None
        and pace.quick(sum([work.values for work in batch]))
    )
