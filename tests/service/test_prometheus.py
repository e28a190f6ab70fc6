"""The rules that ship: valid, right on known answers, and naming only metrics that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from service.metrics import METRIC_NAMES

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "--lint-fatal", "rules.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
    ids=lambda a: "-".join(a[:2]),
)
def test_promtool_accepts(arguments):
    done = subprocess.run(
        ["promtool", *arguments], cwd=FOLDER, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rules() -> list[dict[str, str]]:
    groups = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_rules_name_only_what_is_registered_or_recorded_before():
    recorded: set[str] = set()
    for rule in rules():
        names = set(re.findall(r"[a-z_]+:[a-z0-9_]+:[a-z0-9_]+|\buq_[a-z0-9_]+", rule["expr"]))
        assert names, rule
        assert names <= recorded | METRIC_NAMES, names - recorded - METRIC_NAMES
        if "record" in rule:
            assert re.fullmatch(r"[a-z_]+:[a-z0-9_]+:[a-z0-9_]+", rule["record"])
            recorded.add(rule["record"])


def test_every_recorded_series_and_alert_has_a_known_answer_or_feeds_one():
    tests = (FOLDER / "rules_test.yml").read_text()
    all_rules = rules()
    for rule in all_rules:
        name = rule.get("record", rule.get("alert"))
        used = any(name in other["expr"] for other in all_rules)
        assert used or name in tests, f"{name} is neither used nor tested"
