"""What a watch found, as metrics of the process that watches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from service.metrics import (
    CHANGEPOINTS,
    COVERAGE_BOUND,
    DRIFT_DISTANCE,
    DRIFT_EVIDENCE,
    DRIFT_MARTINGALE,
    MONITOR_ROWS,
    MONITOR_TIME,
    SAMPLES,
    WINDOW_ECE,
    WINDOW_LABELS,
)
from service.monitor.fields import Key
from service.monitor.watch import ERROR, Watch

_ALL = (
    *(CHANGEPOINTS, COVERAGE_BOUND, DRIFT_DISTANCE, DRIFT_EVIDENCE, DRIFT_MARTINGALE),
    *(MONITOR_ROWS, MONITOR_TIME, SAMPLES, WINDOW_ECE, WINDOW_LABELS),
)
_KINDS = ("reliable", "compared", "redundant")
_ECE = {"debiased": "debiased_ece", "floor": "ece_noise_floor"}


def registry() -> CollectorRegistry:
    """The monitor's metrics alone: the service's own are its workers' to tell."""
    found = CollectorRegistry()
    for metric in _ALL:
        found.register(metric)
    return found


class Publisher:
    """Moves the metrics to what a watch says. A counter begins with what was counted before."""

    def __init__(self) -> None:
        self._rows: dict[Key, int] = {}
        self._changes: dict[tuple[Key, str], int] = {}
        self._samples: dict[tuple[Key, str], int] = {}

    def publish(self, watch: Watch, models: Sequence[Mapping[str, Any]]) -> None:
        """``models``: see `service.monitor.watch.windowed`."""
        for key, n in watch.rows.items():
            MONITOR_ROWS.labels(*key).inc(n - self._rows.get(key, 0))
            self._rows[key] = n
            MONITOR_TIME.labels(*key).set(watch.latest[key])
        for key, streams in watch.streams.items():
            for name, stream in streams.items():
                changes = CHANGEPOINTS.labels(*key, name)  # begins at 0, for the first increase
                changes.inc(stream.changes - self._changes.get((key, name), 0))
                self._changes[key, name] = stream.changes
                if stream.martingale is not None:
                    DRIFT_MARTINGALE.labels(*key, name).set(stream.martingale.log10_capital)
                if stream.evidence is not None:
                    DRIFT_EVIDENCE.labels(*key, name).set(stream.evidence)
                for kind, value in stream.distances().items():
                    DRIFT_DISTANCE.labels(*key, name, kind).set(value)
        for key, seen in watch.samples.items():
            counts = {"all": seen.n, **{kind: getattr(seen, kind) for kind in _KINDS}}
            for kind, n in counts.items():
                SAMPLES.labels(*key, kind).inc(n - self._samples.get((key, kind), 0))
                self._samples[key, kind] = n
        for key, levels in watch.coverage.items():
            for level, one in levels.items():
                for bound, value in zip(("lower", "upper"), one.bounds(ERROR), strict=True):
                    COVERAGE_BOUND.labels(*key, level, bound).set(value)
        WINDOW_ECE.clear()  # of a window without labels there is none
        for model in models:
            key = model["model"], model["version"]
            WINDOW_LABELS.labels(*key).set(model["labelled"])
            for bound, name in _ECE.items():
                if (ece := model.get(name)) is not None:
                    WINDOW_ECE.labels(*key, bound).set(ece)
