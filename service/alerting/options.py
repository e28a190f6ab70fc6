"""The numbers that rules, alerts and dashboard depend on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from posthoc.contract import HedgedError

_UNITS = {"y": 365 * 86_400, "w": 7 * 86_400, "d": 86_400, "h": 3600, "m": 60, "s": 1, "ms": 0.001}
_DURATION = re.compile("".join(rf"(?:([0-9]+){unit})?" for unit in _UNITS))
_JOB = re.compile(r"[A-Za-z0-9_./:-]+")
_LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class AlertingError(HedgedError):
    """An option that no rule can be made of; the message names it."""


def seconds(duration: str) -> float:
    """The seconds of a Prometheus duration such as ``5m``, ``1h30m`` or ``250ms``.

    Raises AlertingError for what is none.
    """
    found = _DURATION.fullmatch(duration)
    if found is None or not duration:
        raise AlertingError(
            f"{duration!r} is no duration; write one as Prometheus does: 30s, 5m, 1d"
        )
    return sum(int(n) * size for n, size in zip(found.groups(), _UNITS.values(), strict=True) if n)


@dataclass(frozen=True, slots=True)
class Options:
    """What the rules are made with; durations as Prometheus writes them.

    ``windows`` (ascending) are those that every figure is recorded over; the first is also what
    "now" means to the alerts on the service, so it must hold two scrapes at least, better four.
    ``alert_windows`` are those of ``windows`` over which calibration and coverage are judged, each
    by an alert of its own. A figure is judged on ``min_labels`` labels in its window or more;
    ``margin`` is the number of standard deviations of noise that it may lie off, and
    ``ece_tolerance`` what ECE may lie beyond that: the bundle itself was calibrated on finitely
    many rows. ``coverage_tolerance`` is how far below its level the monitor's bound on coverage
    must lie; ``refused_ratio`` the share of labels that may be refused. ``for_`` is how long
    calibration and coverage must be bad, ``service_for`` how long the service. ``drift_evidence``
    is log10 of the martingale that is an alarm: rows like those of the fit ever pass L in one
    stream of 10^L. ``queue_seconds`` is the 99th percentile of the wait for the model;
    ``full_ratio`` and ``error_ratio`` are shares of requests; ``ledger_rows`` stay in its queue;
    ``label_silence`` and ``monitor_lag`` are how long no label, and no prediction, was read.
    ``without`` are the labels of a replica, which figures are summed over. Raises AlertingError,
    naming the option, for one that makes no sense.
    """

    windows: tuple[str, ...] = ("5m", "1h", "1d")
    alert_windows: tuple[str, ...] = ("1h", "1d")
    interval: str = "1m"
    for_: str = "30m"
    service_for: str = "5m"
    min_labels: int = 200
    margin: float = 3.0
    ece_tolerance: float = 0.02
    label_silence: str = "1d"
    refused_ratio: float = 0.01
    coverage_tolerance: float = 0.02
    drift_evidence: float = 3.0
    monitor_lag: str = "15m"
    ledger_rows: int = 1000
    queue_seconds: float = 1.0
    full_ratio: float = 0.01
    error_ratio: float = 0.01
    job: str = "hedged"
    monitor_job: str = "hedged-monitor"
    without: tuple[str, ...] = ("instance", "pod")

    def __post_init__(self) -> None:
        for name in ("windows", "alert_windows"):
            lengths = [_duration(name, w) for w in getattr(self, name)]
            if not lengths or lengths != sorted(set(lengths)):
                raise AlertingError(
                    f"{name} must be one duration or more, each longer than the last"
                )
        if missing := set(self.alert_windows) - set(self.windows):
            raise AlertingError(f"alert_windows: {min(missing)} is none of windows")
        if _duration("interval", self.interval) > seconds(self.windows[0]):
            raise AlertingError(
                f"interval {self.interval} is longer than the shortest window {self.windows[0]}"
            )
        for name in ("label_silence", "monitor_lag"):
            _duration(name, getattr(self, name))
        for name in ("for_", "service_for"):
            _duration(name, getattr(self, name), least=0)
        for name in ("min_labels", "ledger_rows"):
            if getattr(self, name) < 1:
                raise AlertingError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("margin", "drift_evidence", "queue_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise AlertingError(f"{name} must be above 0, not {getattr(self, name)}")
        shares = ("ece_tolerance", "coverage_tolerance", "refused_ratio", "full_ratio")
        for name in (*shares, "error_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise AlertingError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        for name in ("job", "monitor_job"):
            if not _JOB.fullmatch(getattr(self, name)):
                raise AlertingError(f"{name} {getattr(self, name)!r} is no name of a scrape job")
        if not all(map(_LABEL.fullmatch, self.without)) or not self.without:
            raise AlertingError(f"without must be names of labels, not {self.without}")

    @property
    def gone(self) -> str:
        """``without`` as PromQL writes it."""
        return ", ".join(self.without)


def _duration(name: str, value: str, least: float = 1e-3) -> float:
    try:
        found = seconds(value)
    except AlertingError as e:
        raise AlertingError(f"{name}: {e}") from None
    if found < least:
        raise AlertingError(f"{name}: {value} is too short")
    return found
