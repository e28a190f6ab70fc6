"""The alerts on calibration, labels and drift: each on what somebody can mend, saying how."""

from __future__ import annotations

from dataclasses import replace

from service.alerting.calibration import COVERAGE, ECE, FLOOR, LEVEL, SERVED
from service.alerting.false_pages import expected_false_pages
from service.alerting.options import Options, seconds
from service.alerting.rule import Alert
from service.alerting.traffic import SERVED_ROWS

_WHO = "{{ $labels.model }} {{ $labels.version }}"
_PERCENT = "{{ $value | humanizePercentage }}"
_LEVEL = "{{ $labels.level }}"


def calibration_alerts(options: Options) -> list[Alert]:
    """Calibration and coverage, over each of ``options.alert_windows``; the first says how often
    they are wrong."""
    found = [f(w, options) for w in options.alert_windows for f in (_calibration, _coverage)]
    false = expected_false_pages(options)
    rates = (
        f"Of healthy models with {options.min_labels} labels or more in every window expect, in "
        f"the normal approximation, {false['UQCalibrationDegraded']:.1g} false alarms on "
        f"calibration a month and model, and {false['UQCoverageLow']:.1g} on coverage a month, "
        "model and level: see expected_false_pages in service.alerting. "
    )
    return [replace(found[0], why=rates + found[0].why), *found[1:]]


def _calibration(w: str, o: Options) -> Alert:
    return Alert(
        "UQCalibrationDegraded",
        f"    {ECE}:ratio_increase{w}\n"
        "  >\n"
        f"    {ECE}:noise_floor{w} + {o.ece_tolerance:g}\n"
        "and\n"
        f"  model_version:uq_labeled_predictions:increase{w} >= {o.min_labels}\n"
        "and on (model, version)\n"
        f"  {SERVED}",
        o.for_,
        "warning",
        f"{_WHO} is no longer calibrated: ECE {_PERCENT} over the last {w}",
        "The gap between confidence and accuracy on labelled rows is larger than chance explains.",
        "Compare accuracy with confidence per bin, look for drift and for a change in who sends "
        "labels, and recalibrate on fresh labels with hedged recalibrate.",
        why=f"{o.ece_tolerance:g} beyond the noise of the labels: the bundle itself was calibrated "
        f"on finitely many rows. Fewer than {o.min_labels} labels decide nothing.",
        labels={"window": w},
    )


def _coverage(w: str, o: Options) -> Alert:
    return Alert(
        "UQCoverageLow",
        f"    {COVERAGE}:ratio_increase{w}\n"
        "  <\n"
        f"    {LEVEL} - {COVERAGE}:margin{w}\n"
        "and\n"
        f"  model_version_level:uq_interval_labeled:increase{w} >= {o.min_labels}",
        o.for_,
        "warning",
        f"{_WHO} misses too much: coverage {_PERCENT} at level {_LEVEL} over the last {w}",
        "Fewer true values lie inside the sets or intervals than the level promises, by more than "
        "the noise of labels and of the bundle's own calibration explains.",
        "Rows are no longer like those of the conformal split: look for drift, then recalibrate on "
        "fresh labels with hedged recalibrate. Until then ask for a higher level.",
        why="The margin is there for bundles that are served: their conformal rows are known.",
        labels={"window": w},
    )


def label_alerts(o: Options) -> list[Alert]:
    """Labels that stay away, or are refused."""
    labeled = f"sum without ({o.gone}, version, bin)"
    served = f"sum without ({o.gone}, version, outcome)"
    return [
        Alert(
            "UQLabelsMissing",
            f"  {labeled} (increase(uq_labeled_predictions_total[{o.label_silence}])) == 0\n"
            "and\n"
            f"  {served} (increase(uq_predictions_total"
            f'{{outcome!="rejected"}}[{o.label_silence}])) > 0\n'
            "and\n"
            f"  {labeled} (uq_labeled_predictions_total offset {o.label_silence})",
            o.for_,
            "warning",
            f"no label for {{{{ $labels.model }}}} within {o.label_silence}",
            "It answered, and no label of its answers came: calibration and coverage are not "
            "watched.",
            "See uq_feedback_total for labels that were refused, then ask whoever sends them.",
            why="Over all versions, as a new one waits for its first labels; and only where its "
            f"series are older than {o.label_silence}, else every start would be an alarm. Maps "
            "take no labels and have no series here.",
        ),
        *(_refused(w, o) for w in o.alert_windows),
    ]


def _refused(w: str, o: Options) -> Alert:
    def came(results: str) -> str:
        chosen = f'uq_feedback_total{{result=~"{results}"}}'
        return f"sum without ({o.gone}, result) (increase({chosen}[{w}]))"

    judged = came("accepted|pending|invalid")
    return Alert(
        "UQLabelsRefused",
        f"    {came('invalid')}\n"
        "  /\n"
        f"    {judged}\n"
        ">\n"
        f"  {o.refused_ratio:g}\n"
        "and\n"
        f"  {judged} >= {o.min_labels}",
        o.for_,
        "warning",
        f"{_PERCENT} of the labels for {{{{ $labels.model }}}} were refused over the last {w}",
        "They do not fit the model: classes that it does not know, or no labels at all. None of "
        "them counts, so that accuracy and coverage look better than they are.",
        "Send one of them to POST /v1/labels by itself: the answer says what is wrong with it. Of "
        "classes that came new, train the model anew; no set that it makes can hold them.",
        why="A label that was taken and comes again is not counted again; one that was refused is.",
        labels={"window": w},
    )


def drift_alerts(o: Options) -> list[Alert]:
    """What ``hedged monitor`` found, and a monitor that fell behind."""
    w, now = o.alert_windows[0], o.windows[0]
    stream = f"the {{{{ $labels.stream }}}} of {_WHO}"
    served = f"and on (model, version)\n  {SERVED}"
    return [
        Alert(
            "UQDriftDetected",
            f"  model_version_stream:uq_changepoints:increase{w} > 0\n{served}",
            "0s",
            "warning",
            f"{stream} changed within the last {w}",
            "The monitor found a change point: the stream's level is another than before.",
            "Find out what changed upstream at that time. Where labels come, see whether coverage "
            "and calibration hold; where they do not, recalibrate.",
            why="An event, so it is told at once.",
        ),
        Alert(
            "UQCoverageBroken",
            '  min by (model, version, level) (uq_coverage_bound_ratio{bound="upper"})\n'
            "<\n"
            f"  max by (model, version, level) ({FLOOR})\n"
            "unless\n"
            "  max by (model, version, level) (uq_coverage_alarm)\n"
            f"{served}",
            "0s",
            "warning",
            f"{_WHO} does not cover: at most {_PERCENT} at level {_LEVEL}",
            "The monitor's bound on coverage, which holds at every moment in 39 of 40 streams, "
            f"lies more than {o.coverage_tolerance:g} below what the bundle's conformal rows "
            "allow.",
            "Recalibrate on fresh labels with hedged recalibrate. The bound looks back to the "
            "monitor's start: it begins anew with a new version.",
            why="Few labels a day never fill a window; this gathers them for as long as it takes. "
            "Where the monitor knows the bundle (--bundles), the next alert is in its place.",
        ),
        Alert(
            "UQCoverageBelowPromise",
            '  min by (model, version, level) (uq_coverage_bound_ratio{bound="upper"})\n'
            "and\n"
            "  max by (model, version, level) (uq_coverage_alarm) == 1\n"
            f"{served}",
            "0s",
            "warning",
            f"{_WHO} covers less than it promised: at most {_PERCENT} at level {_LEVEL}",
            "Labels show that coverage is below the lower bound by the bundle's own conformal "
            "rows less a tolerance, whenever one looks.",
            "Recalibrate on fresh labels with hedged recalibrate. The alarm stays until another "
            "version is served.",
            why="A healthy bundle ever does so with probability 0.05 at most: each level's error "
            "is its own, so that of a bundle with L levels is L times that at most.",
        ),
        Alert(
            "UQAccuracyBelowPromise",
            "  max by (model, version) (uq_accuracy_floor_ratio)\n"
            "and\n"
            "  max by (model, version) (uq_accuracy_alarm) == 1\n"
            f"{served}",
            "0s",
            "warning",
            f"{_WHO} is right less often than on its test rows: in less than {_PERCENT}",
            "Labels show that accuracy is below the lower bound by the bundle's own test rows less "
            "a tolerance, whenever one looks.",
            "New thresholds make no better model: see what changed in the inputs, and train anew. "
            "Until then recalibrate, so that confidence says it.",
            why="Again an error of its own, 0.05 at most; see service.monitor.promises.",
        ),
        Alert(
            "UQNotExchangeable",
            f"  uq_drift_martingale_log10 >= {o.drift_evidence:g}\n{served}",
            "0s",
            "warning",
            f"{stream} is no longer like the reference: 10^{{{{ $value | humanize }}}} to 1",
            "A conformal test martingale passed its bound, which rows like those of the fit would "
            f"do in one stream of {10**o.drift_evidence:,.0f}, however long they are watched.",
            "The promises of sets, intervals and flags assume such rows. Compare the reference "
            "with recent rows, and recalibrate on rows like those that come now.",
        ),
        Alert(
            "UQMonitorBehind",
            f"    time() - max without ({o.gone}) (uq_monitor_last_prediction_timestamp_seconds)\n"
            "  >\n"
            f"    {seconds(o.monitor_lag):g}\n"
            "and on (model, version)\n"
            f"  {SERVED_ROWS}:increase{now} > 0",
            o.service_for,
            "warning",
            f"the monitor has seen no prediction of {_WHO} for {{{{ $value | humanizeDuration }}}}",
            "Rows are served, and hedged monitor does not read them: drift is not watched.",
            "See that hedged monitor runs and reads the ledger that the service writes.",
        ),
    ]
