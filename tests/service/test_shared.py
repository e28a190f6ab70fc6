"""One answer for many askers: when it is computed, and who gets it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from service.shared import Shared


class Counter:
    """Answers how often it was asked, each time that the test lets it."""

    def __init__(self, go=True):
        self.asked = 0
        self.go = threading.Semaphore(1000 if go else 0)

    def __call__(self, key):
        self.asked += 1
        answer = (key, self.asked)
        assert self.go.acquire(timeout=30)
        if key == "bad":
            raise OSError(f"failure {self.asked}")
        return answer


def run(main):
    asyncio.run(main())


def test_an_answer_is_given_again_for_a_while():
    async def main():
        count = Counter()
        shared = Shared(count, seconds=3600, name="t")
        assert [await shared.get("a") for _ in range(3)] == [("a", 1)] * 3
        assert await shared.get("b") == ("b", 2)
        shared.forget()
        assert await shared.get("a") == ("a", 3)
        brief = Shared(count, seconds=0, name="t")
        assert [await brief.get("a") for _ in range(2)] == [("a", 4), ("a", 5)]
        shared.close()
        brief.close()

    run(main)


def test_who_comes_after_a_change_waits_for_a_new_answer():
    async def main():
        count = Counter(go=False)
        shared = Shared(count, seconds=3600, name="t")
        early = asyncio.ensure_future(shared.get("a"))
        await asyncio.sleep(0)
        shared.forget()
        late = asyncio.ensure_future(shared.get("a"))
        await asyncio.sleep(0)
        count.go.release(2)
        assert (await early, await late) == (("a", 1), ("a", 2))
        assert await shared.get("a") == ("a", 2)
        shared.close()

    run(main)


def test_a_failure_is_kept_for_nobody_and_leaving_takes_nothing_from_others():
    async def main():
        count = Counter()
        shared = Shared(count, seconds=3600, name="t")
        for n in (1, 2):
            with pytest.raises(OSError, match=f"failure {n}"):
                await shared.get("bad")
        count.go = threading.Semaphore(0)
        leaver, stayer = (asyncio.ensure_future(shared.get("a")) for _ in range(2))
        await asyncio.sleep(0)
        leaver.cancel()
        count.go.release()
        assert await stayer == ("a", 3)
        assert leaver.cancelled()
        shared.close()

    run(main)
