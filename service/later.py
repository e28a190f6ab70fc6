"""What need not stand between a request and its answer is done a little later, together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_SECONDS = 0.01
_BYTES = 4 << 20
_log = logging.getLogger("hedged.later")


class Later:
    """Gathers items for sinks, and gives each sink all of its items ``seconds`` after the first,
    or at once when they hold ``max_bytes``. Used from one event loop; a sink that raises is logged.
    """

    def __init__(self, seconds: float = _SECONDS, max_bytes: int = _BYTES) -> None:
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._bytes = 0
        self._waiting: dict[Callable[[list[Any]], None], list[Any]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, sink: Callable[[list[T]], None], item: T, size: int = 0) -> None:
        """Keep an item of ``size`` bytes for ``sink``."""
        waiting = self._waiting.get(sink)
        if waiting is None:
            waiting = self._waiting[sink] = []
        waiting.append(item)
        self._bytes += size
        if self._bytes > self._max_bytes:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self.flush)

    def flush(self) -> None:
        """Give out everything now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        taken, self._waiting, self._bytes = self._waiting, {}, 0
        for sink, items in taken.items():
            try:
                sink(items)
            except Exception:  # the others' items are not lost with these
                _log.exception("%d items could not be recorded", len(items))
