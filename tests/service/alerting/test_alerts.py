"""Every alert, with the shipped values: what makes it fire, and what nearly does and must not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from service.alerting import rules_text
from tests.service.alerting.promtool import all_rules, input_series, selector, unit_tests

TEXT = rules_text()
M = {"model": "m", "version": "1"}
INFO = 'uq_model_info{model="m",version="1",sha256="f",method="lac",task="x",instance="a"}'
SERVED = {INFO: "1x1600"}


@dataclass
class Case:
    """Streams a minute apart; at ``at`` minutes these alerts, as (labels, summary), and no other
    of that name."""

    name: str
    alert: str
    series: dict[str, str]
    at: dict[int, list[tuple[dict[str, str], str]]] = field(default_factory=dict)


def calm(alert: str, series: dict[str, str], at: int = 100) -> Case:
    return Case("calm", alert, series, {at: []})


def covers(
    a_minute: float, rows: int | None = 500, level: str = "0.9", n: int = 10
) -> dict[str, str]:
    key = {**M, "level": level, "instance": "a"}
    found = {
        selector("uq_interval_labeled_total", key): f"0+{n}x200",
        selector("uq_interval_covered_total", key): f"0+{a_minute}x200",
    }
    if rows is not None:
        found[selector("uq_conformal_rows", {**M, "instance": "a"})] = f"{rows}x200"
    return found


def low(window: str, percent: str, level: str = "0.9") -> tuple[dict[str, str], str]:
    summary = f"m 1 misses too much: coverage {percent} at level {level} over the last {window}"
    return {**M, "level": level, "window": window}, summary


def labels(came: str, served: str) -> dict[str, str]:
    """Labels and answers of two versions on two instances."""
    found = {}
    for version, instance in (("1", "a"), ("2", "b")):
        key = {"model": "m", "version": version, "instance": instance}
        found[selector("uq_labeled_predictions_total", {**key, "bin": "0.90"})] = came
        found[selector("uq_predictions_total", {**key, "outcome": "answered"})] = served
        found[selector("uq_predictions_total", {**key, "outcome": "rejected"})] = "0+9x1600"
    return found


def judged(taken: str, refused: str) -> dict[str, str]:
    """Labels by what became of them; one that is sent again counts nowhere."""
    key = {"model": "m", "instance": "a"}
    return {
        selector("uq_feedback_total", {**key, "result": "accepted"}): taken,
        selector("uq_feedback_total", {**key, "result": "pending"}): taken,
        selector("uq_feedback_total", {**key, "result": "invalid"}): refused,
        selector("uq_feedback_total", {**key, "result": "duplicate"}): "0+90x200",
    }


def refused(window: str, share: str) -> tuple[dict[str, str], str]:
    said = f"{share} of the labels for m were refused over the last {window}"
    return {"model": "m", "window": window}, said


def requests(good: str, bad: str, code: str = "500") -> dict[str, str]:
    name = "uq_request_duration_seconds_count"
    return {
        selector(name, {"route": "/p", "code": "200", "instance": "a"}): good,
        selector(name, {"route": "/p", "code": code, "instance": "a"}): bad,
    }


def turned_away(reason: str, a_minute: int) -> dict[str, str]:
    key = selector("uq_rejected_total", {"reason": reason, "instance": "a"})
    return requests("0+1000x60", "0+0x60", "503") | {key: f"0+{a_minute}x60"}


def waits(slow: int) -> dict[str, str]:
    """Of 100 requests a minute ``slow`` wait 1 to 2.5 seconds, and the others less than one."""
    name, key = "uq_stage_duration_seconds_bucket", {"stage": "queue", "instance": "a"}
    return {
        selector(name, {**key, "le": "1.0"}): f"0+{100 - slow}x60",
        selector(name, {**key, "le": "2.5"}): "0+100x60",
        selector(name, {**key, "le": "+Inf"}): "0+100x60",
    }


def ledger(name: str, values: str) -> dict[str, str]:
    return {selector(f"uq_ledger_{name}", {"instance": "a"}): values}


ENTROPY = {**M, "stream": "entropy"}
CHANGES = selector("uq_changepoints_total", {**ENTROPY, "instance": "w"})
EVIDENCE = selector("uq_drift_martingale_log10", {**ENTROPY, "instance": "w"})
READ = selector("uq_monitor_last_prediction_timestamp_seconds", {**M, "instance": "w"})
ANSWERS = selector("uq_predictions_total", {**M, "outcome": "answered", "instance": "a"})
BEHIND = [({"instance": "a"}, "the ledger of a does not keep up")]


def bound(upper: float, which: str = "upper") -> dict[str, str]:
    key = {**M, "level": "0.9", "bound": which, "instance": "w", "job": "hedged-monitor"}
    return covers(9) | SERVED | {selector("uq_coverage_bound_ratio", key): f"{upper}x200"}


def promise(name: str, values: str, **labels: str) -> dict[str, str]:
    key = {**M, **labels, "instance": "w", "job": "hedged-monitor"}
    return {selector(name, key): values}


CASES = [
    # 600 labels an hour, 500 conformal rows: 0.9 - 3 sqrt(0.09 (1/600 + 1/502)) = 0.8456, less
    # 8/6 0.8 (1/600 + 2/502) = 0.0060; with the 1000 of the day so far 0.8508 - 0.0053. There are
    # 200 after 20 minutes.
    Case(
        "coverage below the margin",
        "UQCoverageLow",
        covers(8.3),
        {45: [], 100: [low("1h", "83%"), low("1d", "83%")]},
    ),
    calm("UQCoverageLow", covers(8.6)),
    # Only in the many labels of the day: 0.8416 with the 700 that there were 30 minutes ago.
    Case("a day sees more", "UQCoverageLow", covers(8.41), {100: [low("1d", "84.1%")]}),
    # With 20 conformal rows the bundle itself may be that far off: 0.9 - 0.195.
    calm("UQCoverageLow", covers(8.3, rows=20)),
    # A version that is served no longer.
    calm("UQCoverageLow", covers(8.3, rows=None)),
    # 180 labels an hour, 195 in all.
    calm("UQCoverageLow", covers(1, n=3), at=65),
    # Any level that a bundle was fitted for: 0.975 - 3 sqrt(0.0244 (1/600 + 1/502)) = 0.9467, less
    # 8/6 0.95 (1/600 + 2/502) = 0.0072.
    Case(
        "an unusual level",
        "UQCoverageLow",
        covers(9.35, level="0.975"),
        {100: [low("1h", "93.5%", "0.975"), low("1d", "93.5%", "0.975")]},
    ),
    calm("UQCoverageLow", covers(9.45, level="0.975")),
    Case(
        "no label for a day",
        "UQLabelsMissing",
        labels("7x1600", "0+1x1600"),
        {1430: [], 1500: [({"model": "m"}, "no label for m within 1d")]},
    ),
    calm("UQLabelsMissing", labels("0x1580 1x20", "0+1x1600"), at=1600),
    calm("UQLabelsMissing", labels("7x1600", "9x1600"), at=1600),
    calm("UQLabelsMissing", labels("0x600", "0+1x600"), at=600),
    # One of five and fifty; 200 labels are there after 20 minutes.
    Case(
        "labels that do not fit",
        "UQLabelsRefused",
        judged("0+5x200", "0+0.2x200"),
        {45: [], 60: [refused("1h", "1.961%"), refused("1d", "1.961%")]},
    ),
    calm("UQLabelsRefused", judged("0+5x200", "0+0.1x200")),
    calm("UQLabelsRefused", judged("0+1x200", "0+1x200"), at=60),
    Case(
        "a change an hour ago",
        "UQDriftDetected",
        SERVED | {CHANGES: "0x29 1x100"},
        {29: [], 31: [(ENTROPY, "the entropy of m 1 changed within the last 1h")], 95: []},
    ),
    calm("UQDriftDetected", {CHANGES: "0x29 1x100"}, at=31),
    Case(
        "evidence beyond its bound",
        "UQNotExchangeable",
        SERVED | {EVIDENCE: "2.9x9 3.2x9"},
        {
            9: [],
            10: [
                (
                    {**ENTROPY, "instance": "w"},
                    "the entropy of m 1 is no longer like the reference: 10^3.2 to 1",
                )
            ],
        },
    ),
    calm("UQNotExchangeable", {EVIDENCE: "9x100"}),
    Case(
        "the bound on coverage",
        "UQCoverageBroken",
        # 500 conformal rows: 0.9 - 0.02 - 2 sqrt(0.09 / 502) = 0.8532.
        bound(0.85),
        {100: [({**M, "level": "0.9"}, "m 1 does not cover: at most 85% at level 0.9")]},
    ),
    calm("UQCoverageBroken", bound(0.856)),
    # The monitor knows the bundle: its own alarm decides, whatever the bound.
    calm("UQCoverageBroken", bound(0.85) | promise("uq_coverage_alarm", "0x200", level="0.9")),
    Case(
        "another level is not known",
        "UQCoverageBroken",
        bound(0.85) | promise("uq_coverage_alarm", "1x200", level="0.95"),
        {100: [({**M, "level": "0.9"}, "m 1 does not cover: at most 85% at level 0.9")]},
    ),
    Case(
        "coverage below the promise",
        "UQCoverageBelowPromise",
        bound(0.86) | promise("uq_coverage_alarm", "0x49 1x200", level="0.9"),
        {
            49: [],
            50: [
                (
                    {**M, "level": "0.9"},
                    "m 1 covers less than it promised: at most 86% at level 0.9",
                )
            ],
        },
    ),
    calm("UQCoverageBelowPromise", bound(0.5)),
    calm("UQCoverageBelowPromise", bound(0.5) | promise("uq_coverage_alarm", "1x9", level="0.8")),
    Case(
        "accuracy below the promise",
        "UQAccuracyBelowPromise",
        SERVED
        | promise("uq_accuracy_floor_ratio", "0.625x200")
        | promise("uq_accuracy_alarm", "0x49 1x200"),
        {
            49: [],
            50: [(M, "m 1 is right less often than on its test rows: in less than 62.5%")],
        },
    ),
    # A version that is served no longer.
    calm(
        "UQAccuracyBelowPromise",
        promise("uq_accuracy_floor_ratio", "0.625x200") | promise("uq_accuracy_alarm", "1x200"),
    ),
    calm("UQCoverageBroken", bound(0.5, "lower")),
    # At 60 minutes it is 3,600 seconds; the newest prediction that was read is of 30 minutes.
    Case(
        "a monitor that reads nothing",
        "UQMonitorBehind",
        {READ: "1800x60", ANSWERS: "0+1x60"},
        {
            44: [],
            60: [(M, "the monitor has seen no prediction of m 1 for 30m 0s")],
        },
    ),
    calm("UQMonitorBehind", {READ: "1800x60", ANSWERS: "9x60"}, at=60),
    Case(
        "no target",
        "UQTargetAbsent",
        {'up{job="other"}': "1x60"},
        {4: [], 6: [({"job": "hedged"}, "Prometheus has no target of job hedged")]},
    ),
    calm("UQTargetAbsent", {'up{job="hedged",instance="a"}': "0x60"}, at=60),
    Case(
        "one target of two is down",
        "UQTargetDown",
        {'up{job="hedged",instance="a"}': "1x9 0x60", 'up{job="hedged",instance="b"}': "1x69"},
        {
            14: [],
            16: [({"job": "hedged", "instance": "a"}, "a cannot be scraped")],
        },
    ),
    calm("UQTargetDown", {'up{job="hedged",instance="a"}': "1x9 0x3 1x50"}, at=14),
    Case(
        "a model that is not served, on one of two replicas",
        "UQModelUnavailable",
        {
            'uq_model_unavailable{model="m",instance="a",pod="p"}': "0x10 1x60",
            'uq_model_unavailable{model="m",instance="b",pod="q"}': "0x70",
        },
        {14: [], 17: [({"model": "m"}, "m is not served")]},
    ),
    calm("UQModelUnavailable", {'uq_model_unavailable{model="m",instance="a"}': "1x3 0x60"}, at=30),
    Case(
        "the monitor is down",
        "UQMonitorDown",
        {'up{job="hedged-monitor",instance="w"}': "0x60"},
        {6: [({"job": "hedged-monitor", "instance": "w"}, "the monitor on w cannot be scraped")]},
    ),
    calm("UQMonitorDown", {'up{job="hedged",instance="a"}': "0x60"}, at=60),
    Case(
        "a full queue",
        "UQSaturated",
        turned_away("queue_full", 20),
        {30: [({}, "2% of requests are turned away: the service is full")]},
    ),
    calm("UQSaturated", turned_away("queue_full", 5), at=30),
    calm("UQSaturated", turned_away("invalid_request", 500), at=30),
    # The 99th of 100 lies half way through the two in the bucket from 1 to 2.5.
    Case(
        "a slow queue",
        "UQQueueSlow",
        waits(2),
        {30: [({"stage": "queue"}, "requests wait 1.75s for the model (99th percentile)")]},
    ),
    calm("UQQueueSlow", waits(0), at=30),
    Case(
        "failures",
        "UQRequestsFail",
        requests("0+970x60", "0+30x60"),
        {30: [({}, "3% of requests fail on the server's side")]},
    ),
    calm("UQRequestsFail", requests("0+995x60", "0+5x60"), at=30),
    calm("UQRequestsFail", requests("0+500x60", "0+500x60", "503"), at=30),
    calm("UQRequestsFail", requests("0+500x60", "0+500x60", "404"), at=30),
    Case("a backlog", "UQLedgerBehind", ledger("queue_rows", "0x9 5000x60"), {10: [], 30: BEHIND}),
    calm("UQLedgerBehind", ledger("queue_rows", "0x9 5000x3 0 5000x3 0x60"), at=20),
    Case("a spool", "UQLedgerBehind", ledger("spooled_total", "0+10x60"), {30: BEHIND}),
    Case("failed writes", "UQLedgerBehind", ledger("write_errors_total", "0+1x60"), {30: BEHIND}),
    calm("UQLedgerBehind", ledger("written_total", "0+1000x60"), at=30),
    Case(
        "a lost row",
        "UQLedgerLosing",
        ledger("dropped_total", "0x9 1x60"),
        {9: [], 10: [({"instance": "a"}, "the ledger of a lost predictions or labels")], 20: []},
    ),
]


def expected(alert: str, labels: dict[str, str], summary: str) -> dict[str, Any]:
    rules = [r for r in all_rules(TEXT) if r.get("alert") == alert]
    texts = rules[0]["annotations"]
    assert "{{" not in texts["description"] + texts["runbook"]
    return {
        "exp_labels": {"severity": rules[0]["labels"]["severity"], **labels},
        "exp_annotations": {**texts, "summary": summary},
    }


@pytest.mark.parametrize("every", [1, 5, 10])
def test_alerts_fire_when_they_must_and_only_then(every, tmp_path):
    """Each judged as seldom as its minutes allow: all rules over hours take their time."""
    tests = [
        {
            "name": f"{case.alert}: {case.name}",
            "interval": "1m",
            "input_series": input_series(case.series),
            "alert_rule_test": [
                {
                    "eval_time": f"{minute}m",
                    "alertname": case.alert,
                    "exp_alerts": [expected(case.alert, *one) for one in alerts],
                }
                for minute, alerts in case.at.items()
            ],
        }
        for case in CASES
        if next(n for n in (10, 5, 1) if all(minute % n == 0 for minute in case.at)) == every
    ]
    assert tests
    unit_tests(tmp_path, TEXT, tests, f"{every}m")


def test_every_alert_has_a_case_that_fires_and_one_that_does_not():
    fires = {case.alert for case in CASES if any(case.at.values())}
    not_fires = {case.alert for case in CASES if not all(case.at.values())}
    names = {rule["alert"] for rule in all_rules(TEXT) if "alert" in rule}
    shipped = {"UQCalibrationDegraded"}  # its cases are in deploy/prometheus/rules_test.yml
    assert fires == not_fires == names - shipped


def test_a_wrong_expectation_is_found(tmp_path):
    case = next(c for c in CASES if c.alert == "UQLedgerLosing")
    test = {
        "interval": "1m",
        "input_series": input_series(case.series),
        "alert_rule_test": [{"eval_time": "10m", "alertname": case.alert, "exp_alerts": []}],
    }
    with pytest.raises(AssertionError, match="UQLedgerLosing"):
        unit_tests(tmp_path, TEXT, [test], "1m")
