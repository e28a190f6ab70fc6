"""`within`: as `asyncio.timeout_at` around the same, and free where nothing is waited for."""

from __future__ import annotations

import asyncio

import pytest

from service.within import within


class Now:
    """An awaitable that is no coroutine, and one whose value is there."""

    def __await__(self):
        return "now"
        yield


async def steps(trace, waits, kept=False):
    """Waits in turn; says where it was cancelled, and takes its time over that where ``kept``."""
    try:
        for event in waits:
            trace.append("waits")
            await event.wait()
    except asyncio.CancelledError:
        trace.append("cancelled")
        if kept:
            await asyncio.sleep(0)
            trace.append("cleaned")
        raise
    return "value"


async def bounded(awaited, by):
    """What `within` must be like."""
    async with asyncio.timeout_at(by):
        return await awaited


def test_what_is_there_needs_no_time():
    async def main():
        past = asyncio.get_running_loop().time() - 1
        assert await within(steps([], []), past) == "value"
        assert await within(Now(), past) == "now"
        with pytest.raises(ZeroDivisionError):
            await within(fails(), past)

    async def fails():
        return 1 // 0

    asyncio.run(main())


@pytest.mark.parametrize("bound", [within, bounded])
@pytest.mark.parametrize("kept", [False, True])
def test_what_takes_too_long_is_cancelled_where_it_waits(bound, kept):
    async def main():
        first, never = asyncio.Event(), asyncio.Event()
        loop, trace = asyncio.get_running_loop(), []
        loop.call_soon(first.set)
        with pytest.raises(TimeoutError):
            await bound(steps(trace, [first, never], kept), loop.time() + 0.01)
        assert trace == ["waits", "waits", "cancelled", *["cleaned"] * kept]
        assert asyncio.current_task().cancelling() == 0
        trace.clear()
        with pytest.raises(TimeoutError):
            await bound(steps(trace, [never], kept), loop.time() - 1)
        assert trace == ["waits", "cancelled", *["cleaned"] * kept]

    asyncio.run(main())


@pytest.mark.parametrize("bound", [within, bounded])
def test_who_is_cancelled_meanwhile_is_not_late(bound):
    async def main():
        trace, never = [], asyncio.Event()
        by = asyncio.get_running_loop().time() + 3600
        task = asyncio.create_task(bound(steps(trace, [never]), by))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert trace == ["waits", "cancelled"]

    asyncio.run(main())


@pytest.mark.parametrize("bound", [within, bounded])
def test_what_comes_in_time_is_given_and_errors_are_its_own(bound):
    async def stubborn(future):
        """Goes on after what it waits for has failed."""
        try:
            return await future
        except LookupError:
            await asyncio.sleep(0)
            return "went on"

    async def main():
        loop = asyncio.get_running_loop()
        for failure, wanted in ((None, 7), (LookupError(), "went on")):
            future = loop.create_future()
            if failure is None:
                loop.call_soon(future.set_result, 7)
            else:
                loop.call_soon(future.set_exception, failure)
            assert await bound(stubborn(future), loop.time() + 3600) == wanted
        future = loop.create_future()
        loop.call_soon(future.set_exception, ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await bound(stubborn(future), loop.time() + 3600)

    asyncio.run(main())
