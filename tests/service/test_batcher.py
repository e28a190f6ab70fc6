"""The batcher around plain functions whose calls the test controls."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import ServiceError
from service.pace import Pace
from service.solve import RowError
from tests.service.gate import OUT, Gate, batcher, double, rows


def test_everything_that_waits_shares_the_next_batch():
    async def main():
        gate, b = Gate(), batcher()
        first = b.submit(gate, rows(0), OUT, timeout=30)
        await gate.wait_for_batch()
        others = [b.submit(gate, rows(k, k + 0.5), OUT, timeout=30) for k in range(1, 6)]
        assert not first.waiting
        assert all(work.waiting for work in others)
        assert b.queued_rows == 10
        gate.go.release(3)
        answers = [(await work.future)["y"].tolist() for work in (first, *others)]
        assert answers == [[0.0], *([2.0 * k, 2 * k + 1.0] for k in range(1, 6))]
        # Eight rows fill a batch: four requests of two, then the fifth.
        assert [len(batch) for batch in gate.batches] == [1, 8, 2]
        assert b.queued_rows == 0
        await b.close()

    asyncio.run(main())


def test_requests_of_other_shapes_and_models_wait_for_their_own_batch():
    async def main():
        gate, b = Gate(), batcher()
        b.submit(gate, rows(0), OUT, timeout=30)
        await gate.wait_for_batch()
        wide = {"x": np.ones((2, 3))}
        works = [
            b.submit(gate, rows(1), OUT, timeout=30),
            b.submit(gate, wide, OUT, timeout=30),
            b.submit(double, rows(5), OUT, timeout=30),
            b.submit(gate, rows(2), OUT, timeout=30),
        ]
        gate.go.release(3)
        answers = [(await work.future)["y"].tolist() for work in works]
        assert answers == [[2.0], (wide["x"] * 2).tolist(), [10.0], [4.0]]
        assert gate.batches == [[0.0], [1.0, 2.0], wide["x"].tolist()]
        await b.close()

    asyncio.run(main())


def test_outputs_of_a_batch_are_the_union():
    seen = []

    def run(feed, names):
        seen.append(list(names))
        return dict.fromkeys(names, feed["x"])

    async def main():
        gate, b = Gate(), batcher()
        b.submit(gate, rows(0), OUT, timeout=30)
        await gate.wait_for_batch()
        one = b.submit(run, rows(1), frozenset({"a"}), timeout=30)
        two = b.submit(run, rows(2), frozenset({"b"}), timeout=30)
        gate.go.release()
        assert (await one.future)["a"].tolist() == [1.0]
        assert (await two.future)["b"].tolist() == [2.0]
        assert seen == [["a", "b"]]
        await b.close()

    asyncio.run(main())


def test_a_full_queue_refuses_at_once():
    async def main():
        gate, b = Gate(), batcher(max_queue_rows=3)
        b.submit(gate, rows(0), OUT, timeout=30)
        await gate.wait_for_batch()
        waiting = b.submit(gate, rows(1, 2), OUT, timeout=30)
        with pytest.raises(ServiceError) as caught:
            b.submit(gate, rows(3, 4), OUT, timeout=30)
        assert caught.value.status == 503
        assert caught.value.headers == {"Retry-After": "1"}
        fits = b.submit(gate, rows(5), OUT, timeout=30)
        gate.go.release(2)
        assert (await waiting.future)["y"].tolist() == [2.0, 4.0]
        assert (await fits.future)["y"].tolist() == [10.0]
        await b.close()

    asyncio.run(main())


def test_cancelled_and_late_work_is_never_computed():
    async def main():
        gate, b = Gate(), batcher()
        b.submit(gate, rows(0), OUT, timeout=30)
        await gate.wait_for_batch()
        gone = b.submit(gate, rows(1), OUT, timeout=30)
        late = b.submit(gate, rows(2), OUT, timeout=0.001)
        kept = b.submit(gate, rows(3), OUT, timeout=30)
        b.drop(gone)
        with pytest.raises(ServiceError, match="waiting for the model") as caught:
            await late.future
        assert caught.value.status == 504
        await asyncio.sleep(0)
        assert b.queued_rows == 1
        gate.go.release(2)
        assert (await kept.future)["y"].tolist() == [6.0]
        assert gate.batches == [[0.0], [3.0]]
        await b.close()

    asyncio.run(main())


def test_a_model_that_hangs_does_not_hold_its_client():
    async def main():
        gate, b = Gate(), batcher()
        work = b.submit(gate, rows(0), OUT, timeout=0.001)
        with pytest.raises(ServiceError, match="in the model"):
            await work.future
        gate.go.release()
        assert (await b.submit(double, rows(1), OUT, timeout=30).future)["y"].tolist() == [2.0]
        await b.close()

    asyncio.run(main())


def test_closing_fails_what_waits_and_finishes_what_runs():
    async def main():
        gate, b = Gate(), batcher()
        running = b.submit(gate, rows(0), OUT, timeout=30)
        await gate.wait_for_batch()
        waiting = b.submit(gate, rows(1), OUT, timeout=30)
        closing = asyncio.ensure_future(b.close())
        with pytest.raises(ServiceError, match="stopping"):
            await waiting.future
        with pytest.raises(ServiceError, match="stopping"):
            b.submit(gate, rows(2), OUT, timeout=30)
        gate.go.release()
        assert (await running.future)["y"].tolist() == [0.0]
        await closing

    asyncio.run(main())


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.lists(st.integers(-1, 5), min_size=1, max_size=6), min_size=1, max_size=12),
    st.integers(1, 9),
)
def test_only_requests_with_a_bad_row_fail(requests, max_batch_rows):
    def picky(feed, names):
        assert len(feed["x"]) <= max_batch_rows
        if (feed["x"] < 0).any():
            raise ValueError("negative")
        return double(feed, names)

    async def main():
        gate, b = Gate(), batcher(max_batch_rows=max_batch_rows, max_queue_rows=1000)
        b.submit(gate, rows(0), OUT, timeout=30)
        works = [b.submit(picky, rows(*values), OUT, timeout=30) for values in requests]
        gate.go.release()
        for values, work in zip(requests, works, strict=True):
            if min(values) < 0:
                with pytest.raises(RowError, match="negative") as caught:
                    await work.future
                assert caught.value.row == next(i for i, v in enumerate(values) if v < 0)
            else:
                assert (await work.future)["y"].tolist() == [2.0 * v for v in values]
        await b.close()

    asyncio.run(main())


def test_the_search_for_a_bad_row_runs_no_larger_batch_than_any():
    sizes = []

    def picky(feed, names):
        sizes.append(len(feed["x"]))
        if (feed["x"] < 0).any():
            raise ValueError("negative")
        return double(feed, names)

    async def main():
        b = batcher(max_batch_rows=4, max_queue_rows=100)
        work = b.submit(picky, rows(*range(40), -1, *range(20)), OUT, timeout=30)
        with pytest.raises(RowError, match="row 40 cannot"):
            await work.future
        await b.close()

    asyncio.run(main())
    assert max(sizes) == 4


def test_a_failure_that_needs_many_rows_fails_nobody():
    def small(feed, names):
        if len(feed["x"]) > 2:
            raise MemoryError("too many rows")
        return double(feed, names)

    async def main():
        b = batcher()
        answer = await b.submit(small, rows(*range(7)), OUT, timeout=30).future
        assert answer["y"].tolist() == [2.0 * k for k in range(7)]
        await b.close()

    asyncio.run(main())


def test_a_model_that_loses_rows_is_caught():
    async def main():
        b = batcher()
        work = b.submit(lambda feed, names: {"y": feed["x"][:1]}, rows(1, 2), OUT, timeout=30)
        answer = await work.future  # alone each row gives one
        assert answer["y"].tolist() == [1.0, 2.0]
        none = b.submit(lambda feed, names: {"y": feed["x"][:0]}, rows(1, 2), OUT, timeout=30)
        with pytest.raises(RowError, match=r"shape \(0,\) for 1 rows"):
            await none.future
        await b.close()

    asyncio.run(main())


def test_what_comes_at_once_shares_a_batch_on_an_idle_device():
    async def main():
        gate, b = Gate(), batcher()
        works = [b.submit(gate, rows(k), OUT, timeout=30) for k in range(3)]
        gate.go.release()
        assert [(await work.future)["y"].tolist() for work in works] == [[0.0], [2.0], [4.0]]
        assert gate.batches == [[0.0, 1.0, 2.0]]
        await b.close()

    asyncio.run(main())


def test_a_quick_model_runs_on_the_loop_and_a_slow_one_in_its_thread():
    async def main():
        threads = []

        def run(feed, names):
            threads.append(threading.current_thread().name)
            return double(feed, names)

        async def answered(*values, b, pace):
            work = b.submit(run, rows(*values), OUT, timeout=30, pace=pace)
            assert (await work.future)["y"].tolist() == [2.0 * v for v in values]
            return "device" if threads[-1].startswith("device") else "loop"

        b, pace = batcher(max_queue_rows=100), Pace()
        assert [await answered(1, b=b, pace=pace) for _ in range(2)] == ["device"] * 2
        for _ in range(9):
            pace.note(1, 1e-6)
        assert [await answered(1, b=b, pace=pace) for _ in range(2)] == ["loop"] * 2
        assert await answered(*range(8), b=b, pace=pace) == "device"  # of eight nothing is known
        for _ in range(9):
            pace.note(1, 1.0)
        assert await answered(1, b=b, pace=pace) == "device"
        gate = Gate()
        b.submit(gate, rows(0), OUT, timeout=30)
        await gate.wait_for_batch()
        for _ in range(9):
            pace.note(1, 1e-6)
        waiting = asyncio.ensure_future(answered(1, b=b, pace=pace))
        await asyncio.sleep(0)
        assert b.queued_rows == 1  # quick, and yet it waits for the device
        gate.go.release()
        await waiting
        await b.close()

    asyncio.run(main())


def test_a_quick_batch_with_a_bad_row_fails_that_row_alone():
    def picky(feed, names):
        if (feed["x"] < 0).any():
            raise ValueError("negative")
        return double(feed, names)

    async def main():
        b, pace = batcher(), Pace()
        for values in range(1, 5):
            for _ in range(9):
                pace.note(values, 1e-6)
        works = [b.submit(picky, rows(k), OUT, timeout=30, pace=pace) for k in (1, -1, 2)]
        found = await asyncio.gather(*(work.future for work in works), return_exceptions=True)
        assert [found[0]["y"].tolist(), found[2]["y"].tolist()] == [[2.0], [4.0]]
        assert isinstance(found[1], RowError)
        await b.close()

    asyncio.run(main())


def test_only_what_has_to_wait_is_told_so_and_once():
    async def main():
        gate, b, told = Gate(), batcher(max_batch_rows=1), []
        first = b.submit(gate, rows(0), OUT, timeout=30, waits=told.append)
        await gate.wait_for_batch()
        others = [b.submit(gate, rows(k), OUT, timeout=30, waits=told.append) for k in (1, 2)]
        gate.go.release(3)
        for work in (first, *others):
            await work.future
        assert told == others
        await b.close()

    asyncio.run(main())
