"""Independent pieces of work over one material, shared out to one process a core.

Processes are started anew and are sent the material once: the model's bytes, and where the cached
rows lie, which every process maps. One thread a process: small matrix products gain nothing by
more, and wait for each other.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from posthoc.runtime import core_count

T = TypeVar("T")

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_held: list[Any] = []  # of a process: what it was sent


def each(
    work: Callable[..., T],
    shared: Any,
    tasks: Sequence[tuple[Any, ...]],
    *,
    workers: int | None = None,
    done: Callable[[int, int], None] | None = None,
) -> Iterator[T]:
    """``work(shared, *task)`` of every task as it is done, in any order.

    ``work`` is a function of a module; it, ``shared`` and the tasks are pickled, each task as often
    as it runs and ``shared`` once a process. ``workers`` is the number of processes (default: one a
    core), 1 works here and starts none. ``done`` is told how many of how many are done.
    """
    count = min(workers or core_count(), len(tasks))
    report = done or (lambda n, total: None)
    report(0, len(tasks))
    if count <= 1:
        for i, task in enumerate(tasks, 1):
            yield work(shared, *task)
            report(i, len(tasks))
        return
    saved = {k: os.environ.get(k) for k in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_hold, initargs=(shared,)
    )
    try:
        waiting = [pool.submit(_call, work, task) for task in tasks]
        for i, future in enumerate(as_completed(waiting), 1):
            yield future.result()
            report(i, len(tasks))
    finally:
        pool.shutdown(cancel_futures=True)
        for key, value in saved.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _hold(shared: Any) -> None:
    _held[:] = [shared]


def _call(work: Callable[..., T], task: tuple[Any, ...]) -> T:
    return work(_held[0], *task)
