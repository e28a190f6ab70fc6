"""What a watch found, as metrics of the process that watches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from calibration.drift.risk_monitor import RiskMonitor
from calibration.drift.shift_kind import KINDS
from service.metrics import (
    ACCURACY_ALARM,
    ACCURACY_EVIDENCE,
    ACCURACY_FLOOR,
    CHANGEPOINTS,
    COVERAGE_ALARM,
    COVERAGE_BOUND,
    COVERAGE_EVIDENCE,
    COVERAGE_FLOOR,
    DRIFT_DISTANCE,
    DRIFT_EVIDENCE,
    DRIFT_MARTINGALE,
    EXPECTED_BIAS,
    MONITOR_ROWS,
    MONITOR_TIME,
    SAMPLES,
    SHIFT_KIND,
    SHIFT_STRANGE,
    WINDOW_ECE,
    WINDOW_LABELS,
)
from service.monitor.fields import Key
from service.monitor.kinds import statement
from service.monitor.stream import Options
from service.monitor.watch import ERROR, Watch
from service.monitor.window import bounds_of

_OF_COVERAGE = (COVERAGE_FLOOR, COVERAGE_EVIDENCE, COVERAGE_ALARM)
_OF_ACCURACY = (ACCURACY_FLOOR, ACCURACY_EVIDENCE, ACCURACY_ALARM)
_ALL = (
    *(CHANGEPOINTS, COVERAGE_BOUND, DRIFT_DISTANCE, DRIFT_EVIDENCE, DRIFT_MARTINGALE),
    *(EXPECTED_BIAS, MONITOR_ROWS, MONITOR_TIME, SAMPLES, WINDOW_ECE, WINDOW_LABELS),
    *(*_OF_COVERAGE, *_OF_ACCURACY, SHIFT_KIND, SHIFT_STRANGE),
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

    def publish(self, watch: Watch, options: Options, models: Sequence[Mapping[str, Any]]) -> None:
        """``options`` are those of the watch; ``models``: see `service.monitor.window.windowed`."""
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
        for key, kinds in watch.kinds.items():
            if (shift := statement(kinds, options)) is not None:
                for kind in KINDS:
                    SHIFT_KIND.labels(*key, kind).set(kind == shift.kind)
                for bound, value in (
                    ("value", shift.strange),
                    ("lower", shift.low),
                    ("upper", shift.high),
                ):
                    SHIFT_STRANGE.labels(*key, bound).set(value)
        for key, levels in watch.coverage.items():
            for level, one in levels.items():
                for bound, value in zip(("lower", "upper"), one.bounds(ERROR), strict=True):
                    COVERAGE_BOUND.labels(*key, level, bound).set(value)
        for key, promises in watch.promises.items():
            for level, one in promises.levels.items():
                _publish(_OF_COVERAGE, (*key, level), one)
            if promises.accuracy is not None:
                _publish(_OF_ACCURACY, key, promises.accuracy)
        WINDOW_ECE.clear()  # of a window without labels there is none
        EXPECTED_BIAS.clear()
        for model in models:
            key = model["model"], model["version"]
            WINDOW_LABELS.labels(*key).set(model["labelled"])
            for bound, name in _ECE.items():
                if (ece := model.get(name)) is not None:
                    WINDOW_ECE.labels(*key, bound).set(ece)
            for kind, bounds in bounds_of(model).items():
                for bound, value in bounds.items():
                    EXPECTED_BIAS.labels(*key, kind, bound).set(value)


def _publish(gauges: tuple[Gauge, Gauge, Gauge], key: tuple[str, ...], one: RiskMonitor) -> None:
    for gauge, value in zip(gauges, (one.floor, one.log10_evidence, one.alarm), strict=True):
        gauge.labels(*key).set(value)
