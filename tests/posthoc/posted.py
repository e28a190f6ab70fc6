"""Workers without a cluster: what is sent and comes back goes through pickle, as it does there."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Posted:
    """A mapper whose function, items and results are pickled; it counts items and their bytes."""

    def __init__(self, workers: int = 2):
        self.workers = workers
        self.sent = 0
        self.items = 0

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterator[Any]:
        there = pickle.loads(pickle.dumps(function))
        for item in items:
            posted = pickle.dumps(item)
            self.sent += len(posted)
            self.items += 1
            yield pickle.loads(pickle.dumps(there(pickle.loads(posted))))
