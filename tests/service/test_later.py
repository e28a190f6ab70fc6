"""What is done later is done together, whole, and whatever one of it raises."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from service import later as latest
from service import writer
from service.later import Later
from service.pace import QUICK_S, Pace


def test_each_sink_gets_all_of_its_items_in_order_and_once():
    async def main():
        later, found = Later(seconds=0.001), []
        done = asyncio.Event()

        def one(items):
            found.append(("one", items))

        def two(items):
            found.append(("two", items))
            done.set()

        later.add(one, 1)
        later.add(two, "a")
        later.add(one, 2)
        assert found == []
        await asyncio.wait_for(done.wait(), 30)
        assert found == [("one", [1, 2]), ("two", ["a"])]
        later.flush()
        assert len(found) == 2
        later.add(one, 3)
        later.flush()  # somebody wants to see it now
        assert found[2:] == [("one", [3])]

    asyncio.run(main())


def test_many_bytes_are_not_kept():
    async def main():
        later, found = Later(seconds=60, max_bytes=100), []
        for size in (60, 30, 20, 5):
            later.add(found.append, size, size)
        assert found == [[60, 30, 20]]
        later.flush()
        assert found == [[60, 30, 20], [5]]

    asyncio.run(main())


def test_a_sink_that_raises_takes_nothing_from_the_others(caplog):
    def broken(items):
        raise OSError("disk full")

    async def main():
        later, found = Later(), []
        later.add(broken, 1)
        later.add(found.extend, 2)
        later.flush()
        assert found == [2]

    asyncio.run(main())
    assert "disk full" in caplog.text


def test_a_pace_needs_several_runs_of_the_size_and_forgets_old_ones():
    pace = Pace()
    for _ in range(4):
        pace.note(100, QUICK_S / 2)
    assert not pace.quick(100)
    pace.note(100, 1.0)  # an outlier, and the fifth run
    assert pace.quick(100)
    assert pace.quick(127)
    assert not pace.quick(128)
    assert not pace.quick(63)
    for _ in range(5):
        pace.note(100, 1.0)
    assert not pace.quick(100)


def test_the_guide_says_at_least_what_a_killed_worker_may_lose():
    guide = Path(__file__).parents[2] / "docs/guides/promises.md"
    said = re.search(
        r"(\d+) ms from the counters and in its last (\d+) ms", guide.read_text("utf-8")
    )
    assert said is not None
    counters, ledger = (int(ms) / 1000 for ms in said.groups())
    assert counters > latest._SECONDS
    assert ledger > latest._SECONDS + writer._LINGER_S
