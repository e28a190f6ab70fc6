"""Bodies are parsed once: small ones at once, large ones beside the event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from posthoc.contract import TensorSpec
from service.errors import ServiceError

LARGE = 256 << 10  # bytes that parse in about as long as a thread takes to answer
_THREADS = 2
_BESIDE = 8  # values of a row that are no input: id, alpha, columns of the table
_SLACK = 4  # commas and brackets inside of texts
_ENVELOPE = 10_000
_VALUE_BYTES = 8  # of a number with its comma, usually
T = TypeVar("T")


class Parser:
    """Parses in few threads; what waits for them is bounded by the bodies that the guard holds."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="hedged-parse")

    async def __call__(
        self, body: bytes, limit: Callable[[], int], parse: Callable[[], T], json: int | None = None
    ) -> T:
        """``parse()``, beside the loop for a large body.

        Raises ServiceError 413 first when the ``json`` bytes (default: all) at the start of a
        large body hold more than ``limit()`` values: parsing holds the interpreter, so that a
        thread alone would not keep the server answering.
        """

        if len(body) <= LARGE:
            return parse()

        def checked() -> T:
            check_values(body, limit(), json)
            return parse()

        return await self.beside(len(body), checked)

    async def beside(self, size: int, work: Callable[[], T]) -> T:
        """``work()`` on so many bytes: at once, or in a thread where they are many."""
        if size <= LARGE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def check_values(body: bytes, limit: int, end: int | None = None) -> None:
    """Raise ServiceError 413 when JSON text, up to ``end``, may hold more than ``limit`` values.

    Each value follows a comma or an opening bracket, so no more than those are there.
    """
    found = 0
    end = len(body) if end is None else end
    for start in range(0, end, LARGE):
        part = (start, min(start + LARGE, end))
        found += sum(body.count(sign, *part) for sign in (b",", b"[", b"{"))
        if found > limit:
            raise ServiceError(
                413,
                "too_many_values",
                f"the body holds more than {limit} values; send fewer rows, or binary tensors",
            )


def most_values(specs: Sequence[TensorSpec], max_rows: int, max_bytes: int) -> int:
    """More values than any JSON request of ``max_rows`` rows has.

    Each row holds its numbers, the lists around them, and what else may stand in it. Where an axis
    is free no row is too long: it is what ``max_bytes`` of JSON hold of numbers of usual length.
    """
    per_row = _BESIDE
    for spec in specs:
        tail = spec.shape[1:]
        if any(d < 0 for d in tail):
            return max_bytes // _VALUE_BYTES + _ENVELOPE
        # One list for each prefix of the axes: a row of 2×3 is 1 list, 2 lists, and 6 numbers.
        per_row += sum(math.prod(tail[:k]) for k in range(len(tail) + 1))
    return _SLACK * max_rows * per_row + _ENVELOPE


def most_labels(max_labels: int, width: int) -> int:
    """More values than ``max_labels`` labels of ``width`` numbers have."""
    return _SLACK * max_labels * (width + _BESIDE) + _ENVELOPE
