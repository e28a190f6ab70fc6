"""How many rows a run may have: of a server, of a model, and in bytes."""

from __future__ import annotations

import asyncio

import numpy as np

from tests.service.gate import OUT, Gate, batcher, double, rows


def test_a_long_request_is_sliced_and_a_delay_collects():
    sizes = []

    def run(feed, names):
        sizes.append(len(feed["x"]))
        return double(feed, names)

    async def main():
        b = batcher(max_batch_rows=4, max_delay=10.0)
        long = np.arange(10.0)
        answer = await b.submit(run, {"x": long}, OUT, timeout=30).future
        assert answer["y"].tolist() == (long * 2).tolist()
        assert sizes == [4, 4, 2]
        works = [b.submit(run, rows(k), OUT, timeout=30) for k in range(4)]
        for work in works:
            await work.future
        assert sizes[3:] == [4]  # one batch of four, long before the delay was over
        alone = batcher(max_delay=0.001)
        assert (await alone.submit(run, rows(1), OUT, timeout=30).future)["y"].tolist() == [2.0]
        await b.close()
        await alone.close()

    asyncio.run(main())


def test_of_a_model_that_gains_nothing_by_more_rows_fewer_requests_share_a_run():
    async def main():
        gate, b = Gate(), batcher()
        first = b.submit(gate, rows(0), OUT, timeout=30, most=2)
        await gate.wait_for_batch()
        others = [b.submit(gate, rows(k), OUT, timeout=30, most=2) for k in range(1, 6)]
        long = b.submit(gate, rows(6, 7, 8), OUT, timeout=30, most=2)
        another = b.submit(double, rows(9), OUT, timeout=30)  # of a model without such a bound
        gate.go.release(5)
        answers = [(await work.future)["y"].tolist() for work in (first, *others, long, another)]
        assert answers == [*([2.0 * k] for k in range(6)), [12.0, 14.0, 16.0], [18.0]]
        assert gate.batches == [[0], [1, 2], [3, 4], [5], [6, 7, 8]]
        await b.close()

    asyncio.run(main())


def test_the_server_s_own_bound_holds_for_every_model():
    async def main():
        gate, b = Gate(), batcher(max_batch_rows=2)
        work = b.submit(gate, rows(0, 1, 2), OUT, timeout=30, most=100)
        gate.go.release(3)
        assert (await work.future)["y"].tolist() == [0.0, 2.0, 4.0]
        assert [len(batch) for batch in gate.batches] == [2, 1]
        await b.close()

    asyncio.run(main())


def test_bytes_bound_a_run_and_one_row_always_goes():
    sizes = []

    def seen(feed, names):
        sizes.append(len(feed["x"]))
        return double(feed, names)

    async def main():
        gate, b = Gate(), batcher(max_queue_rows=100, max_batch_bytes=50)
        b.submit(gate, rows(0), OUT, timeout=30)
        await gate.wait_for_batch()
        works = [
            b.submit(seen, rows(*values), OUT, timeout=30, row_bytes=row_bytes)
            for values, row_bytes in (
                ((1, 2), 10),
                ((3, 4), 20),  # four of the heavier rows would be 80 bytes
                ((5,), 10),
                ((6, 7), 60),
            )
        ]
        gate.go.release()
        answers = [(await work.future)["y"].tolist() for work in works]
        assert answers == [[2.0, 4.0], [6.0, 8.0], [10.0], [12.0, 14.0]]
        assert sizes == [3, 2, 1, 1]
        await b.close()

    asyncio.run(main())
