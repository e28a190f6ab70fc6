"""The metrics of the service, ``uq_*``: calibration as counters of additive statistics.

Every number is a sum over rows, so PromQL gets ECE, coverage, Brier score and log loss over any
window, across workers, replicas and restarts. Works in one process and, when
``PROMETHEUS_MULTIPROC_DIR`` is set before the first import, across worker processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client import Counter

from calibration.metrics.totals import (
    BIN_LABELS,
    ClassificationTotals,
    LevelTotals,
    RegressionTotals,
)
from posthoc.contract import Array
from service.expected_loss import LossScale
from service.exposition import CONTENT_TYPE as CONTENT_TYPE
from service.exposition import BulkHistogram, unmark
from service.exposition import render as render
from service.metrics import (
    ALL,
    BATCH_ROWS,
    BRIER,
    CONFIDENCE,
    CONFIDENCE_SUM,
    CONFORMAL_ROWS,
    CORRECT,
    CRPS,
    DEVICE_INFO,
    EXPECTED_CORRECT,
    EXPECTED_LOSS,
    FEEDBACK,
    FEEDBACK_DELAY,
    FEEDBACK_RESULTS,
    INTERVAL_COVERED,
    INTERVAL_LABELED,
    INTERVAL_WIDTH,
    KEYS_ERRORS,
    LABELED,
    LOG_LOSS,
    MAX_FOREIGN_LEVELS,
    MODEL_INFO,
    MODEL_UNAVAILABLE,
    OOD,
    OOD_PVALUE,
    OUTCOMES,
    PREDICTIONS,
    QUEUE_ROWS,
    REJECTED,
    REQUEST_DURATION,
    SET_SIZE,
    STAGE_DURATION,
    SWAPS,
    UNKNOWN,
    UNKNOWN_GROUPS,
)


@dataclass(frozen=True, slots=True)
class _Level:
    """The children of one level of labelled rows; widths belong to intervals."""

    labeled: Counter
    covered: Counter
    width: Counter | None


class _Series:
    """The children of one model and version, so that the hot path looks nothing up."""

    def __init__(
        self, model: str, version: str, task: str, levels: Sequence[str], labels: bool = True
    ) -> None:
        key = (model, version)
        self.key = key
        self.task = task
        self.closed = bool(levels)
        self.levels: dict[str, _Level] = {}
        self.sizes: dict[str, BulkHistogram] = {}
        self.outcomes = {o: PREDICTIONS.labels(*key, o) for o in OUTCOMES}
        self.ood, self.ood_pvalue = OOD.labels(*key), OOD_PVALUE.labels(*key)
        self.unknown_groups = UNKNOWN_GROUPS.labels(*key)
        if task == "classification":
            self.expected_correct = EXPECTED_CORRECT.labels(*key)
            self.confidence = CONFIDENCE.labels(*key)
            self.sizes = {level: SET_SIZE.labels(*key, level) for level in levels}
        if labels:
            self._add_labels(levels)

    def _add_labels(self, levels: Sequence[str]) -> None:
        key, bins = self.key, BIN_LABELS if self.task == "classification" else (ALL,)
        self.labeled = [LABELED.labels(*key, b) for b in bins]
        if self.task == "classification":
            self.correct = [CORRECT.labels(*key, b) for b in bins]
            self.confidence_sum = [CONFIDENCE_SUM.labels(*key, b) for b in bins]
        else:
            self.crps = CRPS.labels(*key)
        for level in levels:
            self._add_level(level)

    def _add_level(self, level: str) -> None:
        sets = self.task == "classification"
        self.levels[level] = _Level(
            INTERVAL_LABELED.labels(*self.key, level),
            INTERVAL_COVERED.labels(*self.key, level),
            None if sets else INTERVAL_WIDTH.labels(*self.key, level),
        )

    def add_level(self, level: str, totals: LevelTotals) -> None:
        # A client may ask for any level: only the bundle's own become series. Of a version that
        # is no longer served the levels are not known, so there the first few do.
        if level not in self.levels:
            if self.closed or len(self.levels) >= MAX_FOREIGN_LEVELS:
                return
            self._add_level(level)
        series = self.levels[level]
        series.labeled.inc(totals.labeled)
        series.covered.inc(totals.covered)
        if series.width is not None and np.isfinite(totals.size_sum):
            series.width.inc(totals.size_sum)


_series: dict[tuple[str, str], _Series] = {}
_models: set[str] = set()
_calibrated: dict[tuple[str, str], str] = {}  # the bundle that CONFORMAL_ROWS speaks of
_losses: dict[tuple[str, str], tuple[LossScale, Counter]] = {}  # of bundles with a loss head


def register_model(
    model: str,
    version: str,
    identity: str,
    method: str,
    levels: Sequence[str],
    task: str,
    *,
    scored: bool = True,
    labels: bool = True,
    conformal_rows: float = 0,
    loss: LossScale | None = None,
) -> None:
    """Start every series of a bundle at 0 and announce that it is served.

    ``levels`` are its level names such as "0.9"; ``identity`` is its sha256; ``scored`` says that
    probs are kept in the ledger, without which log loss and Brier have no series; without
    ``labels`` nothing that labels move has one. ``conformal_rows``: see `metrics`; 0 is unknown.
    ``loss``: how scores are expected losses, without which these have no series.
    """
    start_series(model, version, levels, task, scored=scored, labels=labels)
    for result in ("ok", "failed"):
        SWAPS.labels(model, result)
    MODEL_INFO.labels(model, version, identity, method, task).set(1)
    mark_unavailable(model, False)
    if conformal_rows:
        CONFORMAL_ROWS.labels(model, version).set(conformal_rows)
        _calibrated[model, version] = identity
    _losses.pop((model, version), None)
    if loss is not None:
        _losses[model, version] = loss, EXPECTED_LOSS.labels(model, version)


def mark_unavailable(model: str, unavailable: bool) -> None:
    """Say whether a name of the root has no version that this process could serve."""
    MODEL_UNAVAILABLE.labels(model).set(int(unavailable))


def set_provider(provider: str) -> None:
    """Announce the provider that a model of this process really runs on."""
    DEVICE_INFO.labels(provider).set(1)


def retire_model(model: str, version: str, identity: str, method: str, task: str) -> None:
    """Say that this process serves a bundle no longer; labels for it still count."""
    unmark(MODEL_INFO, model, version, identity, method, task)
    # Another bundle may be served by now as the same version.
    if _calibrated.get((model, version)) == identity:
        unmark(CONFORMAL_ROWS, model, version)
        del _calibrated[model, version]


def count_swap(model: str, result: str) -> None:
    """A bundle that became live ("ok") or was refused ("failed"); "unknown" for no model yet."""
    SWAPS.labels(model if model in _models else UNKNOWN, result).inc()


def start_series(
    model: str,
    version: str,
    levels: Sequence[str],
    task: str,
    *,
    scored: bool = True,
    labels: bool = True,
) -> None:
    """Start the series of a version at 0, so that ``increase()`` sees its first labels too."""
    series = _Series(model, version, task, levels, labels)
    _series[model, version] = series
    _models.add(model)
    if task == "classification" and scored and labels:
        LOG_LOSS.labels(model, version)
        BRIER.labels(model, version)
    for result in FEEDBACK_RESULTS:
        FEEDBACK.labels(model, result)
    FEEDBACK_DELAY.labels(model)


def observe_prediction(
    model: str, version: str, fields: Mapping[str, Array], level: str | None
) -> None:
    """Count one served batch of N rows; ``level`` is the level name of its sets or intervals."""
    task = "regression" if "mean" in fields else "classification"
    series = _of(model, version, task)
    n = len(fields["mean" if task == "regression" else "label"])
    _observe(series, n, fields, level)


def observe_images(
    model: str, version: str, summary: Mapping[str, Array], level: str | None
) -> None:
    """Count N images by their `service.images.summary`; ``level`` as above.

    An image is one prediction: it adds its mean confidence, mean set size and one pixel's p-value,
    to ``uq_ood_total`` its share of flagged pixels, and counts as abstained when all of it is.
    """
    task = "classification" if "confidence" in summary else "regression"
    series = _of(model, version, task)
    numbers = dict(summary)
    if "abstain" in numbers:
        numbers["abstain"] = numbers["abstain"] == 1
    _observe(series, len(next(iter(summary.values()))), numbers, level)


def _observe(series: _Series, n: int, fields: Mapping[str, Array], level: str | None) -> None:
    abstained = int(np.count_nonzero(fields["abstain"])) if "abstain" in fields else 0
    series.outcomes["answered"].inc(n - abstained)
    if abstained:
        series.outcomes["abstained"].inc(abstained)
    if series.task == "classification":
        # A float32 softmax may sum to a hair above 1; the last bin is closed at 1.
        confidence = np.minimum(np.asarray(fields["confidence"], dtype=np.float64), 1.0)
        series.expected_correct.inc(float(confidence.sum()))
        series.confidence.observe_many(confidence)
        sizes = series.sizes.get(level) if level is not None else None
        if sizes is not None and "set_size" in fields:
            sizes.observe_many(fields["set_size"])
    if "ood" in fields and (flagged := float(np.sum(fields["ood"]))):
        series.ood.inc(flagged)
    if (found := _losses.get(series.key)) is not None and "ood_score" in fields:
        loss, total = found
        total.inc(loss.total(fields["ood_score"]))
    if "ood_pvalue" in fields:
        series.ood_pvalue.observe_many(fields["ood_pvalue"])


def add_totals(model: str, version: str, totals: ClassificationTotals | RegressionTotals) -> None:
    """Move the labelled counters by the sums of newly joined rows."""
    if isinstance(totals, ClassificationTotals):
        series = _of(model, version, "classification")
        for i in np.flatnonzero(totals.count):
            series.labeled[i].inc(int(totals.count[i]))
            series.correct[i].inc(int(totals.correct[i]))
            series.confidence_sum[i].inc(float(totals.confidence_sum[i]))
        if totals.scored:
            LOG_LOSS.labels(model, version).inc(totals.log_loss_sum)
            BRIER.labels(model, version).inc(totals.brier_sum)
    else:
        series = _of(model, version, "regression")
        series.labeled[0].inc(totals.n)
        # The log loss of a density may be negative, which a counter cannot hold: CRPS only.
        series.crps.inc(totals.crps_sum)
    for level, sums in totals.levels.items():
        series.add_level(level, sums)


def observe_requests(requests: Iterable[tuple[str, int, float]]) -> None:
    """Answered requests: route, status and seconds; a route is one of ours, never a raw path."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for route, code, took in requests:
        seconds.setdefault((route, code), []).append(took)
    for (route, code), many in seconds.items():
        REQUEST_DURATION.labels(route, str(code)).observe_many(many)


def observe_batches(batches: Iterable[tuple[int, Sequence[float], float]]) -> None:
    """Runs of a model: rows, the seconds that each request waited, and those of the run."""
    rows, queued, seconds = zip(*batches, strict=True)
    BATCH_ROWS.observe_many(rows)
    STAGE_DURATION.labels("queue").observe_many([s for many in queued for s in many])
    STAGE_DURATION.labels("model").observe_many(seconds)


def set_queue_rows(found: Sequence[int]) -> None:
    """Rows of this process that wait for the device, as they were found one after the other."""
    QUEUE_ROWS.set(found[-1])


def count_rejected(reason: str) -> None:
    """One request turned away."""
    REJECTED.labels(reason).inc()


def count_keys_error() -> None:
    """A changed file of keys that could not be read."""
    KEYS_ERRORS.inc()


def count_rejected_rows(model: str, version: str, n: int) -> None:
    """``n`` rows that a served model did not answer."""
    if (series := _series.get((model, version))) is not None:
        series.outcomes["rejected"].inc(n)


def count_unknown_groups(model: str, version: str, n: int) -> None:
    """``n`` served rows whose group the bundle does not know."""
    if (series := _series.get((model, version))) is not None:
        series.unknown_groups.inc(n)


def count_feedback(model: str, result: str, n: int = 1) -> None:
    """``n`` labels with one of FEEDBACK_RESULTS; a model that is not ours counts as "unknown"."""
    if result not in FEEDBACK_RESULTS:
        raise ValueError(f"feedback result {result!r} is none of {', '.join(FEEDBACK_RESULTS)}")
    FEEDBACK.labels(model if model in _models else UNKNOWN, result).inc(n)


def observe_feedback_delay(model: str, seconds: Array) -> None:
    """Seconds from N predictions to their labels."""
    FEEDBACK_DELAY.labels(model if model in _models else UNKNOWN).observe_many(seconds)


def _of(model: str, version: str, task: str) -> _Series:
    if (model, version) not in _series:
        # A version that another process served, or this one before a restart.
        _series[model, version] = _Series(model, version, task, ())
        _models.add(model)
    return _series[model, version]
