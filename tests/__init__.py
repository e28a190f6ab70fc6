"""The tests. Where several processes share them out (``pytest -n``), each has a core of its own.

This is imported before numpy, which counts the cores that it may use: with threads for all cores in
every process, the processes would wait for each other's.
"""

import os


def _take_a_core(worker: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _take_a_core(os.environ["PYTEST_XDIST_WORKER"])
