"""What prometheus_client lacks for us: whole batches, and an exposition over worker processes."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np
from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    REGISTRY,
    CollectorRegistry,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from posthoc.contract import Array

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_FEW = 256
_MARKS = ("_info", "_conformal_rows")  # end the names of gauges that are never 0, but not there

# One set of series in both modes: across processes there is no *_created, so neither is there here.
disable_created_metrics()  # type: ignore[no-untyped-call]


class BulkHistogram(Histogram):
    """A histogram that takes a whole batch at once."""

    def observe_many(self, amounts: Array | Sequence[float]) -> None:
        """As ``observe`` on each of N finite amounts, at one increment per bucket that is hit."""
        if len(amounts) <= _FEW:  # below this numpy's own overhead is the larger part
            self._observe_few(amounts)
            return
        values = np.asarray(amounts, dtype=np.float64)
        values = values[np.isfinite(values)]
        # side="left": the first bound with amount <= bound, as in Histogram.observe.
        hits = np.bincount(np.searchsorted(self._upper_bounds, values, side="left"))
        self._sum.inc(float(values.sum()))
        for i in np.flatnonzero(hits):
            self._buckets[i].inc(int(hits[i]))

    def _observe_few(self, amounts: Array | Sequence[float]) -> None:
        values = amounts.tolist() if isinstance(amounts, np.ndarray) else amounts
        if len(values) == 1:  # most calls where requests come one by one
            if math.isfinite(value := values[0]):
                self._sum.inc(float(value))
                self._buckets[bisect_left(self._upper_bounds, value)].inc(1)
            return
        total = float(sum(values))
        if not math.isfinite(total):
            values = [value for value in values if math.isfinite(value)]
            total = float(sum(values))
        self._sum.inc(total)
        for i, n in Counter(map(bisect_left, repeat(self._upper_bounds), values)).items():
            self._buckets[i].inc(n)


def sample_names(prefix: str) -> Iterator[str]:
    """The sample names of every metric that is registered under a prefix."""
    for family in REGISTRY.collect():
        if not family.name.startswith(prefix):
            continue
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        yield from (family.name + end for end in ends.get(family.type, ("",)))


def unmark(gauge: Gauge, *labels: str) -> None:
    """Take the series with these labels out of a gauge whose name ends as one of ``_MARKS``."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        # The file of a process forgets nothing: `render` leaves out what is 0.
        gauge.labels(*labels).set(0)
    else:
        gauge.remove(*labels)


def render() -> bytes:
    """The exposition text of this process, or of all worker processes."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is None:
        return generate_latest(REGISTRY)
    _sweep(Path(folder))
    registry = CollectorRegistry()
    registry.register(_Workers(Path(folder)))
    return generate_latest(registry)


class _Workers(Collector):
    """The metrics in the files of all worker processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        # A worker that is starting, or was killed just then, has a file without a header.
        files = [str(f) for f in self._folder.glob("*.db") if _size(f)]
        merged: Iterable[Metric] = MultiProcessCollector.merge(files, accumulate=True)  # type: ignore[no-untyped-call]
        for family in merged:
            if family.name.endswith(_MARKS):
                family.samples = [sample for sample in family.samples if sample.value]
            yield family


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _sweep(folder: Path) -> None:
    """Remove live gauges of processes that are gone: nobody else does after a SIGKILL."""
    for file in folder.glob("gauge_live*_*.db"):
        found = re.fullmatch(r"gauge_live[a-z]*_(\d+)\.db", file.name)
        if found is None:
            continue
        pid = int(found[1])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            try:
                mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
            except FileNotFoundError:
                continue  # another worker is rendering too
        except PermissionError:
            continue  # alive, and somebody else's
