"""What the dashboard shows: four rows of panels, each with its queries and how to read it.

``$window`` ends the names of recorded series, so that every panel shows the window that is chosen;
``$longest`` stands for the longest of them, whatever is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from calibration.drift.label_free import EXPECTED_ASSUMES, STRATIFIED_ASSUMES
from calibration.drift.shift_kind import ASSUMES

_OF = '{model=~"$model",version=~"$version"}'
_MODEL = '{model=~"$model"}'
_NAME = "{{model}} {{version}}"
_BIAS = "uq_expected_accuracy_bias_ratio" + _OF[:-1]
_V, _VL = "model_version:uq_", "model_version_level:uq_"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: ``targets`` are (PromQL, legend); ``unit`` is Grafana's; ``width`` of 24."""

    title: str
    description: str
    targets: tuple[tuple[str, str], ...]
    unit: str = "percentunit"
    kind: Literal["timeseries", "stat", "bargauge"] = "timeseries"
    width: int = 8
    least: float | None = 0
    most: float | None = None


TRUST = (
    Panel(
        "Calibration error",
        "ECE of labelled rows, and the floor below which it may be chance. Above the floor for "
        "long: confidence can no longer be taken at its word.",
        (
            (f"{_V}expected_calibration_error:ratio_increase$window{_OF}", _NAME),
            (f"{_V}expected_calibration_error:noise_floor$window{_OF}", f"floor {_NAME}"),
        ),
    ),
    Panel(
        "Coverage",
        "Share of labelled rows whose truth lies inside the set or interval, and the least that a "
        "healthy bundle shows, given the number of labels and of conformal rows.",
        (
            (f"{_VL}interval_coverage:ratio_increase$window{_OF}", f"{_NAME} at {{{{level}}}}"),
            (
                f"{_VL}interval_level:ratio{_OF} - {_VL}interval_coverage:margin$window{_OF}",
                f"least {_NAME} at {{{{level}}}}",
            ),
        ),
        most=1,
    ),
    Panel(
        "Coverage gap",
        "Coverage less the level that was asked for. Below 0 too few truths lie inside.",
        ((f"{_VL}interval_coverage_gap:difference$window{_OF}", f"{_NAME} at {{{{level}}}}"),),
        least=None,
    ),
    Panel(
        "Accuracy, and what was claimed",
        "Accuracy of labelled rows, their mean confidence, and the expected accuracy of all served "
        "rows, which needs no label and is as good as the calibration.",
        (
            (f"{_V}accuracy:ratio_increase$window{_OF}", f"accuracy {_NAME}"),
            (f"{_V}labeled_confidence:mean_increase$window{_OF}", f"confidence {_NAME}"),
            (f"{_V}expected_accuracy:ratio_increase$window{_OF}", f"expected {_NAME}"),
        ),
        most=1,
    ),
    Panel(
        "Bias of expected accuracy",
        "Mean confidence less accuracy of the labelled rows in the monitor's window, with 95 % "
        "bounds; within chance of 0 for a calibrated model. "
        f"{EXPECTED_ASSUMES} {STRATIFIED_ASSUMES}",
        (
            (f'{_BIAS},kind="raw"}}', f"{{{{bound}}}} {_NAME}"),
            (f'{_BIAS},kind="stratified"}}', f"{{{{bound}}}} as served {_NAME}"),
        ),
        least=None,
    ),
    Panel(
        "Expected loss",
        "Loss that the loss head expects of served rows, without any label, and the log loss of "
        "labelled rows. Of a regressor it is in mean squared errors of the fit: 1 is as then.",
        (
            (f"{_V}expected_loss:mean_increase$window{_OF}", f"expected {_NAME}"),
            (f"{_V}log_loss:mean_increase$window{_OF}", f"log loss {_NAME}"),
        ),
        unit="short",
    ),
    Panel(
        "Set size",
        "Mean and 90th percentile of the classes in a prediction set, over served rows.",
        (
            (f"{_VL}set_size:mean_increase$window{_OF}", f"{_NAME} at {{{{level}}}}"),
            (f"{_VL}set_size:p90_increase$window{_OF}", f"p90 {_NAME} at {{{{level}}}}"),
        ),
        unit="short",
    ),
    Panel(
        "Interval width",
        "Mean width of bounded intervals over labelled rows, in target units.",
        ((f"{_VL}interval_width:mean_increase$window{_OF}", f"{_NAME} at {{{{level}}}}"),),
        unit="short",
    ),
    Panel(
        "Scores",
        "Mean log loss (nats), Brier score and CRPS (target units) of labelled rows; lower is "
        "better.",
        (
            (f"{_V}log_loss:mean_increase$window{_OF}", f"log loss {_NAME}"),
            (f"{_V}brier:mean_increase$window{_OF}", f"Brier {_NAME}"),
            (f"{_V}crps:mean_increase$window{_OF}", f"CRPS {_NAME}"),
        ),
        unit="short",
        width=12,
    ),
    Panel(
        "Anytime-valid coverage bound",
        "Bound on coverage since the monitor began, valid at every moment that it is looked at.",
        (
            (f"uq_coverage_bound_ratio{_OF}", f"{{{{bound}}}} {_NAME} at {{{{level}}}}"),
            (f"uq_coverage_floor_ratio{_OF}", f"promised {_NAME} at {{{{level}}}}"),
        ),
        width=12,
        most=1,
    ),
    Panel(
        "Evidence against what was promised",
        "log10 of the evidence of all labels that coverage, or accuracy, is below what the "
        "bundle's own rows leave at least, less a tolerance. It is an alarm at 1.6, ever.",
        (
            (f"uq_coverage_evidence_log10{_OF}", f"coverage {_NAME} at {{{{level}}}}"),
            (f"uq_accuracy_evidence_log10{_OF}", f"accuracy {_NAME}"),
        ),
        unit="short",
        width=12,
        least=None,
    ),
)

DRIFT = (
    Panel(
        "Out of distribution",
        "Share of served rows that are flagged as strange; of a map its share of pixels.",
        ((f"{_V}ood:ratio_increase$window{_OF}", _NAME),),
    ),
    Panel(
        "Abstention",
        "Share of served rows on which the model abstains.",
        ((f"{_V}abstention:ratio_increase$window{_OF}", _NAME),),
    ),
    Panel(
        "Change points",
        "Changes that the monitor found in a stream, within the window.",
        (
            (
                f"model_version_stream:uq_changepoints:increase$window{_OF}",
                f"{{{{stream}}}} {_NAME}",
            ),
        ),
        unit="short",
    ),
    Panel(
        "Nearness of a change",
        "How near the detector is to calling a change, 1 being there.",
        ((f"uq_drift_evidence_ratio{_OF}", f"{{{{stream}}}} {_NAME}"),),
        unit="short",
    ),
    Panel(
        "Evidence against the reference",
        "log10 of a conformal test martingale: rows like those of the fit pass L once in 10^L "
        "streams, however long they are watched.",
        ((f"uq_drift_martingale_log10{_OF}", f"{{{{stream}}}} {_NAME}"),),
        unit="short",
        least=None,
    ),
    Panel(
        "Distance from the reference",
        "How large a change is, which no p-value says: Kolmogorov-Smirnov distance and population "
        "stability index of the latest window.",
        ((f"uq_drift_distance_ratio{_OF}", f"{{{{kind}}}} {{{{stream}}}} {_NAME}"),),
        unit="short",
    ),
    Panel(
        "What the shift looks like",
        "The kind of shift that the monitor's latest window looks like, for when something else "
        f"has alarmed, and the share of rows that the reference does not explain. {ASSUMES}",
        (
            (f"uq_shift_kind_info{_OF} == 1", f"{{{{kind}}}} {_NAME}"),
            (f"uq_shift_strange_ratio{_OF}", f"strange {{{{bound}}}} {_NAME}"),
        ),
        width=24,
        most=1,
    ),
)

LABELS = (
    Panel(
        "Label coverage",
        "Labels that came over rows that were served. Calibration is that of labelled rows only.",
        ((f"{_V}label_coverage:ratio_increase$window{_OF}", _NAME),),
    ),
    Panel(
        "Labels by confidence bin, longest window",
        "Share of served rows that got a label, by the upper edge of their confidence bin. Uneven "
        "bars: labels were chosen by confidence, and the raw figures are not those of all rows.",
        (
            (
                "model_version_bin:uq_label_coverage:ratio_increase$longest" + _OF,
                f"{{{{bin}}}} {_NAME}",
            ),
        ),
        kind="bargauge",
    ),
    Panel(
        "Labels in the window",
        "Labelled rows that calibration is judged on.",
        ((f"{_V}labeled_predictions:increase$window{_OF}", _NAME),),
        unit="short",
    ),
    Panel(
        "What became of labels",
        "Labels by result; conflict, invalid and expired never count.",
        ((f"model_result:uq_feedback:increase$window{_MODEL}", "{{result}} {{model}}"),),
        unit="short",
    ),
    Panel(
        "Delay of labels",
        "From prediction to label: median and 95th percentile.",
        (
            (f"model:uq_feedback_delay_seconds:p50_increase$window{_MODEL}", "median {{model}}"),
            (f"model:uq_feedback_delay_seconds:p95_increase$window{_MODEL}", "p95 {{model}}"),
        ),
        unit="s",
    ),
    Panel(
        "The monitor's window",
        "Labelled rows that hedged monitor holds, and its debiased ECE with what a calibrated "
        "model would stay below.",
        (
            (f"uq_window_labels{_OF}", f"labels {_NAME}"),
            (f"uq_window_ece_ratio{_OF}", f"ECE {{{{bound}}}} {_NAME}"),
        ),
        unit="short",
    ),
)

SERVICE = (
    Panel(
        "Requests",
        "Requests a second, by route.",
        (("route:uq_request_duration_seconds_count:rate$window", "{{route}}"),),
        unit="reqps",
    ),
    Panel(
        "Errors",
        "Share of requests with a status of 500 or above, and that was turned away for want of "
        "room or time.",
        (
            ("route:uq_request_errors:ratio_rate$window", "{{route}}"),
            ("job:uq_rejected_full:ratio_rate$window", "turned away"),
        ),
    ),
    Panel(
        "Duration of requests",
        "Median and 99th percentile, by route.",
        (
            ("route:uq_request_duration_seconds:p50_rate$window", "median {{route}}"),
            ("route:uq_request_duration_seconds:p99_rate$window", "p99 {{route}}"),
        ),
        unit="s",
    ),
    Panel(
        "Stages",
        "99th percentile of the time in the queue and in the model.",
        (("stage:uq_stage_duration_seconds:p99_rate$window", "{{stage}}"),),
        unit="s",
    ),
    Panel(
        "Queue and batches",
        "Most rows that waited for the device, and mean rows in one run of the model.",
        (
            ("job:uq_queue_rows:max$window", "waiting"),
            ("job:uq_batch_rows:mean_rate$window", "in a batch"),
        ),
        unit="short",
    ),
    Panel(
        "Turned away",
        "Requests a second, by reason.",
        (("reason:uq_rejected:rate$window", "{{reason}}"),),
        unit="reqps",
    ),
    Panel(
        "Ledger",
        "Rows that stay in the queue, that are spooled while the store is away, and that were "
        "lost.",
        (
            ("instance:uq_ledger_queue_rows:min$window", "queue {{instance}}"),
            ("instance:uq_ledger_spooled:increase$window", "spooled {{instance}}"),
            ("instance:uq_ledger_dropped:increase$window", "lost {{instance}}"),
        ),
        unit="short",
    ),
    Panel(
        "Rows served",
        "Rows by outcome within the window.",
        (
            (
                f"model_version_outcome:uq_predictions:increase$window{_OF}",
                f"{{{{outcome}}}} {_NAME}",
            ),
        ),
        unit="short",
    ),
    Panel(
        "Bundles",
        "What is served: version, method, identity, and the rows that its thresholds stand on.",
        (
            (f"uq_model_info{_OF}", f"{_NAME} {{{{method}}}} {{{{sha256}}}}"),
            (f"uq_conformal_rows{_OF}", f"conformal rows {_NAME}"),
        ),
        unit="short",
        kind="stat",
    ),
)

ROWS: dict[str, tuple[Panel, ...]] = {
    "Trust": TRUST,
    "Drift": DRIFT,
    "Labels": LABELS,
    "Service": SERVICE,
}
