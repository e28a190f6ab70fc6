"""Counters of a model of each task, of which every increase is known."""

from __future__ import annotations

import math

import numpy as np

from calibration.metrics.totals import BIN_LABELS
from tests.service.alerting.promtool import line, selector

# Minutes of the segments, oldest first: within each a counter is a straight line, so its increase
# over a window that ends with the last one is exact, and differs from that over another window.
SEGMENTS = (60, 1380, 55, 5)
END = sum(SEGMENTS)
MINUTES = {"5m": 5, "1h": 60, "1d": 1440}
INSTANCES = ("a", "b")
M, R = {"model": "m", "version": "1"}, {"model": "r", "version": "1"}
JOB = {"job": "hedged"}
SIZES = ("0.0", "1.0", "2.0", "3.0", "5.0", "+Inf")
SECONDS = ("0.01", "0.1", "1.0", "+Inf")
DELAYS = ("10.0", "60.0", "+Inf")
EDGES = (*(f"{i / 20:g}" for i in range(1, 20)), "1.0", "+Inf")
Labels = dict[str, str]


class Streams:
    """Counters on two instances, by name and labels, as steps a minute in each segment."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.steps: dict[tuple[str, tuple[tuple[str, str], ...], str], np.ndarray] = {}
        self.gauges: dict[str, str] = {}

    def add(self, name: str, labels: Labels, steps: np.ndarray, job: str = "hedged") -> None:
        """``steps``: instances × segments."""
        for instance, row in zip(INSTANCES, steps, strict=True):
            key = name, tuple({"job": job, **labels}.items()), instance
            assert key not in self.steps
            self.steps[key] = row

    def draw(self, low: float = 0, high: float = 9) -> np.ndarray:
        return self.rng.integers(low, high + 1, size=(len(INSTANCES), len(SEGMENTS))).astype(float)

    def histogram(self, name: str, labels: Labels, bounds: tuple[str, ...]) -> None:
        parts = [self.draw() for _ in bounds]
        for bound, total in zip(bounds, np.cumsum(parts, axis=0), strict=True):
            self.add(f"{name}_bucket", {**labels, "le": bound}, total)
        self.add(f"{name}_count", labels, np.sum(parts, axis=0))
        self.add(f"{name}_sum", labels, self.draw())

    def increase(self, name: str, window: str, instance: str | None = None, **labels: str) -> float:
        """Over the last minutes, of all series that carry these labels."""
        took, left = [], MINUTES[window]
        for n in reversed(SEGMENTS):
            took.append(min(n, left))
            left -= took[-1]
        minutes = np.array(took[::-1])
        found = [
            float(steps @ minutes)
            for (n, have, at), steps in self.steps.items()
            if n == name and labels.items() <= dict(have).items() and instance in (None, at)
        ]
        assert found, (name, labels)
        return math.fsum(found)

    def series(self) -> dict[str, str]:
        found = dict(self.gauges)
        for (name, labels, instance), steps in self.steps.items():
            key = selector(name, {**dict(labels), "instance": instance})
            found[key] = line(list(zip(steps.tolist(), SEGMENTS, strict=True)))
        return found


def streams() -> Streams:
    s = Streams()
    for i, b in enumerate(BIN_LABELS):
        n = s.draw(1) if i != 3 else 0 * s.draw()  # nothing ever falls into one bin
        s.add("uq_labeled_predictions_total", {**M, "bin": b}, n)
        s.add("uq_labeled_correct_total", {**M, "bin": b}, n * s.rng.random(n.shape))
        s.add("uq_labeled_confidence_sum_total", {**M, "bin": b}, n * s.rng.random(n.shape))
    s.add("uq_labeled_predictions_total", {**R, "bin": "all"}, s.draw(1))
    for name in ("log_loss", "brier", "expected_correct"):
        s.add(f"uq_{name}_sum_total".replace("correct_sum", "correct"), M, s.draw() / 7)
    s.add("uq_crps_sum_total", R, s.draw() / 7)
    for labels, level in ((M, "0.9"), (R, "0.9"), (R, "0.975")):
        n = s.draw(1)
        s.add("uq_interval_labeled_total", {**labels, "level": level}, n)
        s.add("uq_interval_covered_total", {**labels, "level": level}, n * s.rng.random(n.shape))
    # A level that nobody has labels of: no ratio, and no NaN.
    for name in ("labeled", "covered"):
        s.add(f"uq_interval_{name}_total", {**M, "level": "0.95"}, 0 * s.draw())
    for level in ("0.9", "0.975"):
        s.add("uq_interval_width_sum_total", {**R, "level": level}, s.draw() / 3)
    s.histogram("uq_set_size", {**M, "level": "0.9"}, SIZES)
    for labels in (M, R):
        for outcome in ("answered", "abstained", "rejected"):
            s.add("uq_predictions_total", {**labels, "outcome": outcome}, s.draw(1))
        s.add("uq_ood_total", labels, s.draw() / 11)
        s.add("uq_expected_loss_sum_total", labels, s.draw(1) / 13)
    s.histogram("uq_confidence", M, EDGES)
    for route, code in (("/a", "200"), ("/a", "500"), ("/a", "404"), ("/b", "200")):
        s.histogram("uq_request_duration_seconds", {"route": route, "code": code}, SECONDS)
    for stage in ("queue", "model"):
        s.histogram("uq_stage_duration_seconds", {"stage": stage}, SECONDS)
    s.histogram("uq_batch_rows", {}, ("1.0", "+Inf"))
    for reason in ("queue_full", "timeout", "invalid_request"):
        s.add("uq_rejected_total", {"reason": reason}, s.draw(1))
    for result in ("joined", "conflict"):
        s.add("uq_feedback_total", {"model": "m", "result": result}, s.draw())
    s.histogram("uq_feedback_delay_seconds", {"model": "m"}, DELAYS)
    for name in ("written", "dropped", "spooled", "write_errors"):
        s.add(f"uq_ledger_{name}_total", {}, s.draw(1))
    s.add("uq_changepoints_total", {**M, "stream": "entropy"}, s.draw(1), job="hedged-monitor")
    identity = {"sha256": "f", "method": "laplace", "task": "classification"}
    for instance, rows in zip(INSTANCES, (500, 500), strict=True):
        at = {**JOB, "instance": instance}
        for labels in (M, R):
            s.gauges[selector("uq_model_info", {**labels, **identity, **at})] = f"1x{END}"
            s.gauges[selector("uq_conformal_rows", {**labels, **at})] = f"{rows}x{END}"
    # Of instance b a queue that was long an hour ago, and one row that never left the ledger's.
    for name, least in (("uq_queue_rows", 0), ("uq_ledger_queue_rows", 1)):
        s.gauges[selector(name, {**JOB, "instance": "a"})] = f"7x{END}"
        values = f"{least}x{END - 31} 90 {least}x29"
        s.gauges[selector(name, {**JOB, "instance": "b"})] = values
    return s
