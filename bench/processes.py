"""Independent pieces of a benchmark shared out to one process a core, one thread a process."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

T = TypeVar("T")

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def each(work: Callable[..., T], tasks: Sequence[tuple[object, ...]]) -> Iterator[T]:
    """``work(*task)`` of every task as it is done, in any order; progress on stderr. ``work`` and
    its arguments are pickled: a function of a module, plain values. What one raises, or who stops
    asking, ends the others."""
    saved = {k: os.environ.get(k) for k in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            waiting = [pool.submit(work, *task) for task in tasks]
            try:
                for i, done in enumerate(as_completed(waiting), 1):
                    print(f"{i}/{len(tasks)}", file=sys.stderr, flush=True)
                    yield done.result()
            except BaseException:  # of whatever kind, Ctrl-C too: nobody wants the others any more
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                    process.join()
                raise
    finally:
        for key, value in saved.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
