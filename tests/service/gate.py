"""A model whose calls the test controls, and a batcher to put around it."""

from __future__ import annotations

import asyncio
import threading

import numpy as np

from service.batcher import Batcher

OUT = frozenset({"y"})


def double(feed, names):
    return {"y": feed["x"] * 2}


class Gate:
    """A model that notes its batches and answers each only when the test lets it."""

    def __init__(self):
        self.batches = []
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self, feed, names):
        self.batches.append(feed["x"].tolist())
        self.begun.release()
        assert self.go.acquire(timeout=30)
        return double(feed, names)

    async def wait_for_batch(self):
        assert await asyncio.to_thread(self.begun.acquire, timeout=30)


def batcher(**changes):
    return Batcher(**{"max_batch_rows": 8, "max_queue_rows": 16, **changes})


def rows(*values):
    return {"x": np.array(values, np.float64)}
