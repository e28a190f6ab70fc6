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
EXPECTED_LOSS = Counter(
    "uq_expected_loss_sum_total",
    "Sum of the loss that the head of the score expected_loss expects of served rows: log loss in "
    "nats, or squared error in units of the mean one of the fit.",
    _MV,
)
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
MODEL_UNAVAILABLE = Gauge(
    "uq_model_unavailable",
    "1 while a name of the root has no version that can be served, and its requests get 503.",
    ("model",),
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
# Of bundles that the monitor knows: what their own rows leave at least, less a tolerance.
COVERAGE_FLOOR = Gauge(
    "uq_coverage_floor_ratio",
    "Coverage that is no alarm: the bundle's own lower bound less a tolerance.",
    (*_MV, "level"),
)
COVERAGE_EVIDENCE = Gauge(
    "uq_coverage_evidence_log10",
    "Evidence of all labels that coverage is below its floor; a bundle that is not ever passes L "
    "with probability at most 10^-L.",
    (*_MV, "level"),
)
COVERAGE_ALARM = Gauge(
    "uq_coverage_alarm",
    "1 once the evidence passed its bound, else 0. Each level's error is its own: 0.05, ever.",
    (*_MV, "level"),
)
ACCURACY_FLOOR = Gauge(
    "uq_accuracy_floor_ratio",
    "Accuracy that is no alarm: the lower bound by the bundle's test rows less a tolerance.",
    _MV,
)
ACCURACY_EVIDENCE = Gauge(
    "uq_accuracy_evidence_log10", "As uq_coverage_evidence_log10, of accuracy and its floor.", _MV
)
ACCURACY_ALARM = Gauge("uq_accuracy_alarm", "As uq_coverage_alarm, of accuracy.", _MV)
EXPECTED_BIAS = Gauge(
    "uq_expected_accuracy_bias_ratio",
    "Expected (mean confidence) less observed accuracy of the labelled rows in the monitor's "
    "window, by kind: raw, or stratified by what was served, right only if labels are missing at "
    "random given confidence. Bounds: value, lower and upper of 95 %, and of raw chance, which a "
    "calibrated model's bias stays within.",
    (*_MV, "kind", "bound"),
)
SHIFT_KIND = Gauge(
    "uq_shift_kind_info",
    "1 for the kind of shift that the latest window looks like, 0 for the others; a statement, no "
    "alarm.",
    (*_MV, "kind"),
)
SHIFT_STRANGE = Gauge(
    "uq_shift_strange_ratio",
    "Share of the latest window that the reference does not explain: value, and bounds of 95 %.",
    (*_MV, "bound"),
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

# Of `hedged score --textfile`, in a file of its own; `service.scoring.textfile` has the values.
_BATCH = ("batch",)
BATCH_INFO = Gauge(
    "uq_batch_job_info",
    "1 for what the latest run of a job read and wrote, batch being the name of its file; run and "
    "sha256 (of the bundle) are known once it ended well.",
    (*_BATCH, "bundle", "sha256", "input", "output", "run"),
)
BATCH_INPUT_ROWS = Gauge("uq_batch_job_input_rows", "Rows of all readable files.", _BATCH)
BATCH_RESULT_ROWS = Gauge(
    "uq_batch_job_rows",
    "Rows so far: good with a prediction, bad without; those of earlier goes at the same run too.",
    (*_BATCH, "result"),
)
BATCH_FRAGMENTS = Gauge(
    "uq_batch_job_fragments", "Fragments of the input that are done, and left.", (*_BATCH, "state")
)
BATCH_FAILED = Gauge(
    "uq_batch_job_failed_files", "Files, or parts of them, that could not be read.", _BATCH
)
BATCH_RATE = Gauge(
    "uq_batch_job_rows_per_second", "Rows that this go scored, by its seconds.", _BATCH
)
BATCH_SECONDS = Gauge("uq_batch_job_duration_seconds", "Time that this go took so far.", _BATCH)
BATCH_RUNNING = Gauge(
    "uq_batch_job_running",
    "1 from a run's begin to its end; of one that was killed the file just grows old.",
    _BATCH,
)
BATCH_SUCCESS = Gauge(
    "uq_batch_job_success",
    "1 where the latest run that ended scored everything, 0 where it stopped or could not read a "
    "file.",
    _BATCH,
)
BATCH_LAST_SUCCESS = Gauge(
    "uq_batch_job_last_success_timestamp_seconds", "When a run last scored everything.", _BATCH
)
BATCH_JOB = (
    *(BATCH_INFO, BATCH_INPUT_ROWS, BATCH_RESULT_ROWS, BATCH_FRAGMENTS, BATCH_FAILED, BATCH_RATE),
    *(BATCH_SECONDS, BATCH_RUNNING, BATCH_SUCCESS, BATCH_LAST_SUCCESS),
)

METRIC_NAMES: frozenset[str] = frozenset(sample_names("uq_"))
"""Every sample name that ``render`` may give; rules, alerts and dashboards use no other."""
