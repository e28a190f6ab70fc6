"""One slow answer for everybody who asks for it at about the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(slots=True)
class _Flight(Generic[T]):
    answer: asyncio.Future[T]
    until: float | None = None  # monotonic; None while it is being computed


class Shared(Generic[K, T]):
    """``compute(key)`` in one thread of its own; an answer is given again for ``seconds``.

    Used from one event loop. Whoever asks while the answer is being computed waits for that one;
    failures are given to those and kept for nobody else. ``key`` must come from a closed set.
    """

    def __init__(self, compute: Callable[[K], T], *, seconds: float, name: str) -> None:
        self._compute = compute
        self._seconds = seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._flights: dict[K, _Flight[T]] = {}

    async def get(self, key: K) -> T:
        """The answer for ``key``, at most ``seconds`` old. Raises what ``compute`` raises."""
        flight = self._flights.get(key)
        if flight is None or (flight.until is not None and monotonic() >= flight.until):
            loop = asyncio.get_running_loop()
            flight = _Flight(loop.run_in_executor(self._thread, self._compute, key))
            self._flights[key] = flight
            flight.answer.add_done_callback(lambda _: self._landed(key, flight))
        return await asyncio.shield(flight.answer)  # one who leaves takes it from nobody

    def forget(self) -> None:
        """Whoever asks from now on gets an answer that was begun after now."""
        self._flights.clear()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _landed(self, key: K, flight: _Flight[T]) -> None:
        flight.until = monotonic() + self._seconds
        failed = flight.answer.cancelled() or flight.answer.exception() is not None
        if failed and self._flights.get(key) is flight:
            del self._flights[key]
