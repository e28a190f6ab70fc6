"""What need not stand between a request and its answer is done a little later, together."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_SECONDS = 0.01
_BYTES = 4 << 20
_log = logging.getLogger("hedged.later")


class Later:
    """Gathers items for sinks, and gives each sink all of its items ``seconds`` after the first,
    or at once when they hold ``max_bytes``. Used from one event loop, whose other work has its turn
    between two sinks; a sink that raises is logged.
    """

    def __init__(self, seconds: float = _SECONDS, max_bytes: int = _BYTES) -> None:
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._bytes = 0
        self._waiting: defaultdict[Callable[[list[Any]], None], list[Any]] = defaultdict(list)
        self._due: deque[tuple[Callable[[list[Any]], None], list[Any]]] = deque()
        self._handle: asyncio.Handle | None = None  # of the next turn

    def add(self, sink: Callable[[list[T]], None], item: T, size: int = 0) -> None:
        """Keep an item of ``size`` bytes for ``sink``."""
        self._waiting[sink].append(item)
        self._bytes += size
        if self._bytes > self._max_bytes:
            self.flush()
        elif self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(self._seconds, self._turn)

    def flush(self) -> None:
        """Give out everything now."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._take()
        while self._due:
            self._give()

    def _turn(self) -> None:
        """Give one sink what is due, and see to the others."""
        if not self._due:
            self._take()
        self._give()
        loop = asyncio.get_running_loop()
        self._handle = None
        if self._due:
            self._handle = loop.call_soon(self._turn)
        elif self._waiting:  # they came meanwhile
            self._handle = loop.call_later(self._seconds, self._turn)

    def _take(self) -> None:
        self._due.extend(self._waiting.items())
        self._waiting, self._bytes = defaultdict(list), 0

    def _give(self) -> None:
        sink, items = self._due.popleft()
        try:
            sink(items)
        except Exception:  # the others' items are not lost with these
            _log.exception("%d items could not be recorded", len(items))
