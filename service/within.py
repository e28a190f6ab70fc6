"""A bound on the time that something is waited for, which costs nothing where nothing is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


async def within(awaited: Awaitable[T], by: float) -> T:
    """What is awaited. Raises TimeoutError where that takes longer than until ``by``, by the loop's
    clock.

    `asyncio.timeout` costs 10 µs, and most of a server's messages have come, or can go, at once:
    so they are taken as far as they get without one.
    """
    steps = awaited.__await__()
    try:
        first = next(steps)
    except StopIteration as done:
        value: T = done.value
        return value
    async with asyncio.timeout_at(by):
        return await _Rest(steps, first)


class _Rest(Generic[T]):
    """What is left of an awaitable that has begun and waits for ``first``."""

    def __init__(self, steps: Generator[Any, Any, T], first: Any) -> None:
        self._steps = steps
        self._waits_for = first

    def __await__(self) -> Generator[Any, Any, T]:
        waits_for = self._waits_for
        while True:
            try:
                sent = yield waits_for
            except BaseException as e:  # of whatever kind: it belongs to what is awaited
                thrown: BaseException | None = e
            else:
                thrown = None
            try:
                waits_for = self._steps.send(sent) if thrown is None else self._steps.throw(thrown)
            except StopIteration as done:
                value: T = done.value
                return value
