"""Every metric of the service, ``uq_*``, by name: what is counted, and by which labels.

`service.instruments` moves them; nothing else does, but for the ledger's own.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from calibration.metrics.totals import BIN_EDGES
from service.exposition import BulkHistogram, sample_names

OUTCOMES = ("answered", "abstained", "rejected")
FEEDBACK_RESULTS = (
    "accepted",
    "pending",
    "duplicate",
    "conflict",
    "invalid",
    "spooled",
    "joined",
    "expired",
)
ALL = "all"  # the bin of regression rows, which have no confidence
UNKNOWN = "unknown"  # the model of what names none of ours
MAX_FOREIGN_LEVELS = 16

_MV = ("model", "version")
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_SIZES = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
_DELAYS = (1, 10, 60, 600, 3600, 6 * 3600, 86_400, 3 * 86_400, 7 * 86_400, 30 * 86_400)
_PVALUES = (0.001, 0.005, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 11)))

PREDICTIONS = Counter(
    "uq_predictions_total", "Rows by outcome; an image is one.", (*_MV, "outcome")
)
EXPECTED_CORRECT = Counter(
    "uq_expected_correct_total",
    "Sum of confidence over all predicted rows; of an image its mean.",
    _MV,
)
LABELED = Counter(
    "uq_labeled_predictions_total",
    "Rows whose label came, by the upper edge of their confidence bin.",
    (*_MV, "bin"),
)
CORRECT = Counter(
    "uq_labeled_correct_total", "Labelled rows whose prediction was right.", (*_MV, "bin")
)
CONFIDENCE_SUM = Counter(
    "uq_labeled_confidence_sum_total", "Sum of confidence over labelled rows.", (*_MV, "bin")
)
INTERVAL_LABELED = Counter(
    "uq_interval_labeled_total", "Labelled rows with a set or interval.", (*_MV, "level")
)
INTERVAL_COVERED = Counter(
    "uq_interval_covered_total", "Labelled rows whose truth was inside.", (*_MV, "level")
)
INTERVAL_WIDTH = Counter(
    "uq_interval_width_sum_total",
    "Sum of interval widths over labelled rows; unbounded intervals are left out.",
    (*_MV, "level"),
)
LOG_LOSS = Counter("uq_log_loss_sum_total", "Sum of log loss over labelled rows, in nats.", _MV)
BRIER = Counter("uq_brier_sum_total", "Sum of Brier scores over labelled rows.", _MV)
CRPS = Counter("uq_crps_sum_total", "Sum of CRPS over labelled rows, in target units.", _MV)
OOD = Counter(
    "uq_ood_total", "Rows flagged as out of distribution; of an image its share of pixels.", _MV
)
UNKNOWN_GROUPS = Counter(
    "uq_unknown_groups_total",
    "Rows of a group that the bundle has no threshold for; they had that of all rows.",
    _MV,
)
OOD_PVALUE = BulkHistogram(
    "uq_ood_pvalue", "Conformal p-value of the row being like the reference.", _MV, buckets=_PVALUES
)
CONFIDENCE = BulkHistogram(
    "uq_confidence",
    "Calibrated probability that the label is right.",
    _MV,
    buckets=BIN_EDGES.tolist(),
)
SET_SIZE = BulkHistogram(
    "uq_set_size", "Classes in the prediction set.", (*_MV, "level"), buckets=_SIZES
)
FEEDBACK = Counter("uq_feedback_total", "Labels by what became of them.", ("model", "result"))
FEEDBACK_DELAY = BulkHistogram(
    "uq_feedback_delay_seconds", "From prediction to label.", ("model",), buckets=_DELAYS
)
REQUEST_DURATION = BulkHistogram(
    "uq_request_duration_seconds", "From request to answer.", ("route", "code"), buckets=_SECONDS
)
STAGE_DURATION = BulkHistogram(
    "uq_stage_duration_seconds", "Time in one stage of a request.", ("stage",), buckets=_SECONDS
)
BATCH_ROWS = BulkHistogram("uq_batch_rows", "Rows in one run of the model.", buckets=_ROWS)
QUEUE_ROWS = Gauge("uq_queue_rows", "Rows waiting for the device.", multiprocess_mode="livesum")
REJECTED = Counter("uq_rejected_total", "Requests turned away, by reason.", ("reason",))
KEYS_ERRORS = Counter(
    "uq_keys_reload_errors_total", "Changes of the file of keys that could not be read."
)
MODEL_INFO = Gauge(
    "uq_model_info",
    "1 while the bundle is served.",
    (*_MV, "sha256", "method", "task"),
    multiprocess_mode="livemax",
)
CONFORMAL_ROWS = Gauge(
    "uq_conformal_rows",
    "Rows that the thresholds of a served bundle were found on: images of maps, effective rows "
    "where they have weights.",
    _MV,
    multiprocess_mode="livemax",
)
SWAPS = Counter("uq_swaps_total", "Bundles that became live, by each worker.", ("model", "result"))
DEVICE_INFO = Gauge(
    "uq_device_info",
    "1 for the ONNX Runtime provider that runs the models.",
    ("provider",),
    multiprocess_mode="livemax",
)
LEDGER_QUEUE_ROWS = Gauge(
    "uq_ledger_queue_rows",
    "Predictions waiting to be written to the ledger.",
    multiprocess_mode="livesum",
)
LEDGER_WRITTEN = Counter("uq_ledger_written_total", "Predictions handed to the store.")
LEDGER_DROPPED = Counter("uq_ledger_dropped_total", "Predictions and labels lost for the ledger.")
LEDGER_WRITE_ERRORS = Counter("uq_ledger_write_errors_total", "Failed writes to the store.")
LEDGER_SPOOLED = Counter(
    "uq_ledger_spooled_total", "Predictions and labels kept on local disk while the store was away."
)

# Of `hedged monitor`, which alone moves them: they need history, and a gauge has one owner.
_STREAM = (*_MV, "stream")
CHANGEPOINTS = Counter("uq_changepoints_total", "Changes that were found in a stream.", _STREAM)
DRIFT_EVIDENCE = Gauge(
    "uq_drift_evidence_ratio",
    "How near a change is to being called, 1 being there: of dsm and bocd the posterior "
    "probability of a recent change, of cusum its sum over its limit.",
    _STREAM,
)
DRIFT_MARTINGALE = Gauge(
    "uq_drift_martingale_log10",
    "Evidence that a stream is no longer exchangeable with the reference; its null passes L with "
    "probability at most 10^-L, ever.",
    _STREAM,
)
DRIFT_DISTANCE = Gauge(
    "uq_drift_distance_ratio",
    "Distance of a stream's latest window from the reference, by kind (ks, psi), and what chance "
    "leaves it below (ks_floor, psi_floor).",
    (*_STREAM, "kind"),
)
WINDOW_LABELS = Gauge("uq_window_labels", "Labelled rows in the monitor's window.", _MV)
WINDOW_ECE = Gauge(
    "uq_window_ece_ratio",
    "Debiased ECE of the monitor's window, and what a calibrated model would stay below.",
    (*_MV, "bound"),
)
COVERAGE_BOUND = Gauge(
    "uq_coverage_bound_ratio",
    "Anytime-valid bound on coverage since the monitor began.",
    (*_MV, "level", "bound"),
)
SAMPLES = Counter(
    "uq_sample_rows_total",
    "Rows by EATA's filter: all; reliable, of low entropy; compared, those with others before; "
    "redundant, those that point where the others did.",
    (*_MV, "kind"),
)
MONITOR_ROWS = Counter("uq_monitor_rows_total", "Predictions that the monitor has read.", _MV)
MONITOR_TIME = Gauge(
    "uq_monitor_last_prediction_timestamp_seconds",
    "Time of the latest prediction that the monitor has read.",
    _MV,
)

METRIC_NAMES: frozenset[str] = frozenset(sample_names("uq_"))
"""Every sample name that ``render`` may give; rules, alerts and dashboards use no other."""
