"""``hedged alerting`` makes what is shipped, and the same for other windows."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.hedged.conftest import Call, assert_one_line

DEPLOY = Path(__file__).parents[2] / "deploy"
WINDOWS = ("--windows", "20s,40s", "--alert-windows", "40s", "--interval", "5s")


def test_the_defaults_are_what_is_shipped(call: Call) -> None:
    for what, file in (
        ("rules", "prometheus/rules.yml"),
        ("dashboard", "grafana/dashboards/hedged.json"),
    ):
        made = call("alerting", what)
        assert made.code == 0, made.err
        assert made.out == (DEPLOY / file).read_text("utf-8")


def test_other_windows_reach_every_rule(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "rules.yml"
    options = ("--for", "3s", "--min-labels", 17, "--job", "ours", "--label-silence", "30s")
    assert call("alerting", "rules", *WINDOWS, *options, "--out", file).code == 0
    text = file.read_text("utf-8")
    for gone in ("[5m]", "[1h]", "[1d]", ">= 200", 'job="hedged"'):
        assert gone not in text
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    alerts = {rule["alert"]: rule for rule in rules if "alert" in rule}
    assert alerts["UQCoverageLow"]["for"] == "3s"
    assert ">= 17" in alerts["UQCoverageLow"]["expr"]
    assert alerts["UQTargetAbsent"]["expr"] == 'absent(up{job="ours"})'
    made = call("alerting", "dashboard", *WINDOWS)
    assert made.code == 0
    assert "increase1h" not in json.dumps(json.loads(made.out))


def test_what_no_rule_can_be_made_of_is_named(call: Call) -> None:
    assert_one_line(call("alerting", "rules", "--windows", "5m,soon"), "windows")
    assert_one_line(call("alerting", "rules", "--windows", "1h,5m"), "windows")
    assert_one_line(call("alerting", "rules", "--min-labels", 0), "min_labels")
    assert call("alerting", "poem").code == 2
