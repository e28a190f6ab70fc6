"""The rules as text: names, options, and what is refused."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import service
from posthoc.contract import HedgedError
from service.alerting import AlertingError, Options, rules_text
from service.alerting.options import seconds
from service.alerting.traffic import FULL
from service.metrics import METRIC_NAMES
from tests.service.alerting.promtool import all_rules, promtool

RECORD = re.compile(r"[a-z_]+:[a-z0-9_]+:[a-z0-9_]+")
NAME = re.compile(rf"{RECORD.pattern}|\buq_[a-z0-9_]+|\bup\b")
QUICK = Options(
    windows=("5s", "15s", "1m30s"),
    alert_windows=("15s",),
    interval="1s",
    for_="0s",
    service_for="2s",
    min_labels=10,
    label_silence="30s",
    monitor_lag="500ms",
    job="incident",
    without=("instance",),
)


@pytest.mark.parametrize("options", [Options(), QUICK], ids=["shipped", "quick"])
def test_rules_name_only_what_is_registered_or_recorded_before(options):
    recorded: set[str] = set()
    for rule in all_rules(rules_text(options)):
        names = set(NAME.findall(rule["expr"]))
        assert names, rule
        assert names <= recorded | METRIC_NAMES | {"up"}, names - recorded - METRIC_NAMES
        if "record" in rule:
            assert RECORD.fullmatch(rule["record"])
            recorded.add(rule["record"])


@pytest.mark.parametrize("options", [Options(), QUICK], ids=["shipped", "quick"])
def test_every_alert_says_what_is_wrong_and_what_to_do(options):
    alerts = [rule for rule in all_rules(rules_text(options)) if "alert" in rule]
    assert {a["alert"] for a in alerts} == {
        *("UQCalibrationDegraded", "UQCoverageLow", "UQCoverageBroken", "UQLabelsMissing"),
        *("UQDriftDetected", "UQNotExchangeable", "UQMonitorBehind", "UQMonitorDown"),
        *("UQTargetAbsent", "UQTargetDown", "UQSaturated", "UQQueueSlow", "UQRequestsFail"),
        *(
            "UQModelUnavailable",
            "UQLedgerBehind",
            "UQLedgerLosing",
            "UQCoverageBelowPromise",
            "UQAccuracyBelowPromise",
            "UQLabelsRefused",
        ),
    }
    for alert in alerts:
        assert alert["labels"]["severity"] in {"warning", "critical"}
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}
        assert all(len(text) > 20 for text in alert["annotations"].values())
    for name in ("UQCalibrationDegraded", "UQCoverageLow"):
        found = [a["labels"]["window"] for a in alerts if a["alert"] == name]
        assert found == list(options.alert_windows)


def test_reasons_comments_and_numbers_reach_the_file():
    text = rules_text(Options(min_labels=321, margin=4, ece_tolerance=0.07, for_="45m"))
    assert "# Expected calibration error: sum over bins of |confidence - correct|" in text
    assert ">= 321" in text
    assert "4 * sqrt(" in text
    assert "+ 0.07" in text
    assert "for: 45m" in text
    assert "false alarms on" in " ".join(text.split())
    # What holds for every window is said once.
    assert text.count("Scores of the labelled rows") == 1
    assert text.count("Label coverage by confidence bin") == 1


def test_the_reasons_of_a_full_server_are_the_services_own():
    code = "\n".join(p.read_text() for p in Path(service.__path__[0]).glob("*.py"))
    for reason in FULL:
        assert f'"{reason}"' in code, reason


def test_quick_rules_are_accepted(tmp_path):
    (tmp_path / "rules.yml").write_text(rules_text(QUICK))
    promtool(tmp_path, "check", "rules", "--lint-fatal", "rules.yml")


UNIT = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.sampled_from(list(UNIT)), unique=True, min_size=1), st.data())
def test_durations_are_read_as_prometheus_reads_them(units, data):
    units.sort(key=lambda u: -UNIT[u])
    amounts = [data.draw(st.integers(0, 500)) for _ in units]
    text = "".join(f"{n}{u}" for n, u in zip(amounts, units, strict=True))
    total = sum(n * UNIT[u] for n, u in zip(amounts, units, strict=True))
    assert seconds(text) == pytest.approx(total / 1000)


@pytest.mark.parametrize("text", ["", "5", "m", "5 m", "-5m", "1m5h", "5m\n", "1.5h", "5min", "٣m"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(AlertingError, match="no duration"):
        seconds(text)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"windows": ()}, "windows must be one duration or more"),
        ({"windows": ("1h", "5m")}, "each longer than the last"),
        ({"windows": ("1h", "60m")}, "each longer than the last"),
        ({"windows": ("5m", "soon")}, "windows: 'soon' is no duration"),
        ({"windows": ("0s", "1h")}, "windows: 0s is too short"),
        ({"alert_windows": ("2h",)}, "alert_windows: 2h is none of windows"),
        ({"alert_windows": ()}, "alert_windows must be"),
        ({"interval": "10m"}, "interval 10m is longer than the shortest window 5m"),
        ({"interval": "0s"}, "interval: 0s is too short"),
        ({"for_": "-1m"}, "for_: '-1m' is no duration"),
        ({"service_for": ""}, "service_for"),
        ({"label_silence": "1x"}, "label_silence"),
        ({"monitor_lag": "0m"}, "monitor_lag"),
        ({"min_labels": 0}, "min_labels must be at least 1, not 0"),
        ({"ledger_rows": -1}, "ledger_rows"),
        ({"margin": 0.0}, "margin must be above 0"),
        ({"margin": float("nan")}, "margin must be above 0"),
        ({"drift_evidence": float("inf")}, "drift_evidence"),
        ({"queue_seconds": -1.0}, "queue_seconds"),
        ({"ece_tolerance": 1.0}, "ece_tolerance must lie in"),
        ({"coverage_tolerance": -0.1}, "coverage_tolerance"),
        ({"full_ratio": 2.0}, "full_ratio"),
        ({"error_ratio": float("nan")}, "error_ratio"),
        ({"job": 'a"} or vector(1)'}, "job"),
        ({"monitor_job": ""}, "monitor_job"),
        ({"without": ()}, "without must be names of labels"),
        ({"without": ("instance)",)}, "without must be names of labels"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else None,
)
def test_options_that_make_no_sense_are_refused_by_name(given, says):
    with pytest.raises(AlertingError, match=says) as e:
        Options(**given)
    assert isinstance(e.value, HedgedError)


def test_every_option_is_explained():
    assert Options.__doc__ is not None
    for field in fields(Options):
        if field.name not in {"interval", "job", "monitor_job"}:
            assert f"``{field.name}``" in Options.__doc__, field.name


def test_the_file_is_plain_yaml():
    assert set(yaml.safe_load(rules_text())) == {"groups"}
