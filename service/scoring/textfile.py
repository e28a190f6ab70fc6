"""How a run goes, as a ``.prom`` file for the textfile collector of Prometheus' node_exporter.

A batch job is gone before anybody scrapes it; its file stays. It is written when the run begins,
every few seconds, and when it ends, well or not; always whole, by `write_to_textfile`. A run that
ends badly keeps the time of the last one that did not, so an alert may say "no success for a day".
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import Gauge, write_to_textfile
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from posthoc.contract import DataError
from service.metrics import (
    BATCH_FAILED,
    BATCH_FRAGMENTS,
    BATCH_INFO,
    BATCH_INPUT_ROWS,
    BATCH_JOB,
    BATCH_LAST_SUCCESS,
    BATCH_RATE,
    BATCH_RESULT_ROWS,
    BATCH_RUNNING,
    BATCH_SECONDS,
    BATCH_SUCCESS,
)
from service.scoring.errors import ScoringError, first_line
from service.scoring.places import shown_url
from service.scoring.summary import Progress, Summary

EVERY = 5.0  # seconds from one writing to the next

_log = logging.getLogger(__name__)
_Values = dict[Gauge, list[tuple[dict[str, str], float]]]


@contextmanager
def reporting(
    path: Path, *, bundle: str, input: str, output: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[Textfile]:
    """A file at ``path`` that says how the run inside the block goes. `Textfile.tell` it of its
    progress, `Textfile.done` of its end; a block that is left otherwise is a run that failed.

    Raises DataError for a path that the collector would not read, and ScoringError where it cannot
    be written; once the run has begun that is a warning, and the run goes on.
    """
    if path.suffix != ".prom":
        raise DataError(f"{path}: the textfile collector reads names that end in .prom")
    about = {"bundle": bundle, "input": shown_url(input), "output": shown_url(output)}
    file = Textfile(path, about, clock)
    try:
        file.write()
    except OSError as e:
        raise ScoringError(f"cannot write {path}: {e.strerror or first_line(e)}") from e
    try:
        yield file
    finally:
        file.end()


class Textfile:
    """The file of one run; ``clock`` gives seconds that only grow."""

    def __init__(self, path: Path, about: Mapping[str, str], clock: Callable[[], float]):
        self._path, self._about, self._clock = path, about, clock
        self._began = self._written = clock()
        self._before: int | None = None
        self._values: _Values = {
            BATCH_INFO: [({**about, "sha256": "", "run": ""}, 1)],
            BATCH_RUNNING: [({}, 1)],
        }
        for gauge, value in _remembered(path).items():
            self._values[gauge] = [({}, value)]
        self._good = False

    def tell(self, progress: Progress) -> None:
        """How far the run is."""
        if self._before is None:
            self._before = progress.rows_done
        seconds = self._clock() - self._began
        rate = (progress.rows_done - self._before) / seconds if seconds > 0 else 0.0
        good = progress.rows_done - progress.bad
        self._counts(progress.rows, good, progress.bad, progress.failed, seconds, rate)
        left = progress.fragments - progress.fragments_done
        self._fragments(progress.fragments_done, left)
        if self._clock() - self._written >= EVERY:
            self._write()

    def done(self, summary: Summary) -> None:
        """The run ended, and what it did."""
        about = {**self._about, "sha256": summary.bundle, "run": summary.run}
        self._values[BATCH_INFO] = [(about, 1)]
        failed = len(summary.failed)
        self._counts(
            summary.rows,
            summary.good,
            summary.errors,
            failed,
            summary.seconds,
            summary.rows_per_s,
        )
        self._fragments(summary.fragments - failed, failed)
        self._good = not summary.failed

    def end(self) -> None:
        """Nothing more will come."""
        self._values[BATCH_RUNNING] = [({}, 0)]
        self._values[BATCH_SUCCESS] = [({}, int(self._good))]
        if self._good:
            self._values[BATCH_LAST_SUCCESS] = [({}, time.time())]
        self._write()

    def write(self) -> None:
        """Write the file as it stands. Raises OSError."""
        self._written = self._clock()
        write_to_textfile(str(self._path), _Job(self._path.stem, self._values))

    def _write(self) -> None:
        try:
            self.write()
        except OSError as e:
            _log.warning("cannot write %s: %s", self._path, e.strerror or first_line(e))

    def _counts(
        self, rows: int, good: int, bad: int, failed: int, seconds: float, rate: float
    ) -> None:
        self._values[BATCH_INPUT_ROWS] = [({}, rows)]
        self._values[BATCH_RESULT_ROWS] = [({"result": "good"}, good), ({"result": "bad"}, bad)]
        self._values[BATCH_FAILED] = [({}, failed)]
        self._values[BATCH_SECONDS] = [({}, seconds)]
        self._values[BATCH_RATE] = [({}, rate)]

    def _fragments(self, done: int, left: int) -> None:
        self._values[BATCH_FRAGMENTS] = [({"state": "done"}, done), ({"state": "left"}, left)]


class _Job(Collector):
    """The values of one job, under the names that `service.metrics` knows."""

    def __init__(self, batch: str, values: _Values):
        self._batch, self._values = batch, values

    def collect(self) -> Iterable[Metric]:
        for gauge in BATCH_JOB:
            (family,) = gauge.describe()
            for labels, value in self._values.get(gauge, []):
                family.add_sample(family.name, {"batch": self._batch, **labels}, value)
            if family.samples:
                yield family


def _remembered(path: Path) -> dict[Gauge, float]:
    """What the file of an earlier run says of success; nothing where it is none."""
    kept = {next(iter(g.describe())).name: g for g in (BATCH_SUCCESS, BATCH_LAST_SUCCESS)}
    try:
        families = list(text_string_to_metric_families(path.read_text()))
    except (OSError, ValueError):
        return {}
    return {
        kept[sample.name]: sample.value
        for family in families
        for sample in family.samples
        if sample.name in kept
    }
