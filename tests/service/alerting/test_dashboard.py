"""The dashboard: of Grafana's shape, laid out without overlaps, and asking only for what exists."""

from __future__ import annotations

import json
import re
from itertools import combinations

import jsonschema
import pytest
import yaml

from service.alerting import Options, dashboard_text, rules_text
from service.metrics import METRIC_NAMES
from tests.service.alerting.promtool import all_rules, promtool
from tests.service.alerting.test_rules import NAME, QUICK

SOURCE = {
    "type": "object",
    "properties": {"type": {"const": "prometheus"}, "uid": {"const": "${datasource}"}},
    "required": ["type", "uid"],
    "additionalProperties": False,
}
PLACE = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 23},
        "y": {"type": "integer", "minimum": 0},
        "w": {"type": "integer", "minimum": 1, "maximum": 24},
        "h": {"type": "integer", "minimum": 1},
    },
    "required": ["x", "y", "w", "h"],
    "additionalProperties": False,
}
TARGET = {
    "type": "object",
    "properties": {
        "refId": {"type": "string", "pattern": "^[A-Z]$"},
        "datasource": SOURCE,
        "expr": {"type": "string", "minLength": 1},
        "legendFormat": {"type": "string", "minLength": 1},
        "instant": {"type": "boolean"},
        "range": {"type": "boolean"},
    },
    "required": ["refId", "datasource", "expr"],
    "additionalProperties": False,
}
ROW = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1},
        "type": {"const": "row"},
        "title": {"type": "string", "minLength": 1},
        "collapsed": {"const": False},
        "gridPos": PLACE,
        "panels": {"const": []},
    },
    "required": ["id", "type", "title", "gridPos", "panels"],
    "additionalProperties": False,
}
PANEL = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1},
        "type": {"enum": ["timeseries", "stat", "bargauge"]},
        "title": {"type": "string", "minLength": 1},
        "description": {"type": "string", "minLength": 20},
        "gridPos": PLACE,
        "datasource": SOURCE,
        "fieldConfig": {
            "type": "object",
            "properties": {
                "defaults": {
                    "type": "object",
                    "properties": {
                        "unit": {"enum": ["percentunit", "short", "s", "reqps"]},
                        "min": {"type": "number"},
                        "max": {"type": "number"},
                        "custom": {"type": "object"},
                    },
                    "required": ["unit"],
                    "additionalProperties": False,
                },
                "overrides": {"type": "array"},
            },
            "required": ["defaults", "overrides"],
        },
        "options": {"type": "object"},
        "targets": {"type": "array", "items": TARGET, "minItems": 1},
    },
    "required": ["id", "type", "title", "description", "gridPos", "datasource", "targets"],
    "additionalProperties": False,
}
VARIABLE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$"},
        "type": {"enum": ["datasource", "query", "custom"]},
        "query": {},
        "hide": {"enum": [0, 1, 2]},
    },
    "required": ["name", "type", "query", "hide"],
}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "uid": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,40}$"},
        "title": {"type": "string", "minLength": 1},
        "schemaVersion": {"type": "integer", "minimum": 36},
        "version": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "refresh": {"type": "string", "pattern": "^[0-9]+[smh]$"},
        "time": {"type": "object", "required": ["from", "to"]},
        "templating": {
            "type": "object",
            "properties": {"list": {"type": "array", "items": VARIABLE}},
            "required": ["list"],
        },
        "panels": {"type": "array", "items": {"anyOf": [ROW, PANEL]}},
    },
    "required": ["uid", "title", "schemaVersion", "panels", "templating", "time"],
    "not": {"anyOf": [{"required": ["id"]}, {"required": ["__inputs"]}]},
}
OPTIONS = [Options(), QUICK]


def dashboard(options: Options = OPTIONS[0]) -> dict:
    return json.loads(dashboard_text(options))


def panels(options: Options = OPTIONS[0]) -> list[dict]:
    return [p for p in dashboard(options)["panels"] if p["type"] != "row"]


def expressions(options: Options) -> list[str]:
    """Every expression, as Grafana sends it for each choice of the window."""
    found = {
        target["expr"].replace("$model", ".*").replace("$version", "1|2").replace("$window", w)
        for panel in panels(options)
        for target in panel["targets"]
        for w in options.windows
    }
    return sorted(found)


def test_it_has_grafanas_shape():
    jsonschema.Draft202012Validator(SCHEMA).validate(dashboard())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["panels"][1].pop("targets"),
        lambda d: d["panels"][1]["targets"][0].update(datasource="Prometheus"),
        lambda d: d["panels"][1]["gridPos"].update(x=24),
        lambda d: d.update(__inputs=[]),
        lambda d: d.update(id=7),
    ],
)
def test_the_schema_notices(spoil):
    spoiled = dashboard()
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(spoiled)


def test_rows_and_ids():
    found = dashboard()["panels"]
    assert [p["title"] for p in found if p["type"] == "row"] == [
        *("Trust", "Drift", "Labels", "Service")
    ]
    assert found[0]["type"] == "row"
    ids = [p["id"] for p in found]
    assert len(set(ids)) == len(ids)
    titles = [p["title"] for p in found]
    assert len(set(titles)) == len(titles)
    for panel in panels():
        refs = [t["refId"] for t in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_no_two_panels_overlap_and_each_lies_below_its_row():
    found = [p["gridPos"] for p in dashboard()["panels"]]
    for a in found:
        assert a["x"] + a["w"] <= 24
    for a, b in combinations(found, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart_y = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart_x or apart_y, (a, b)
    assert [p["y"] for p in found] == sorted(p["y"] for p in found)


def test_variables_choose_source_model_version_and_window():
    variables = {v["name"]: v for v in dashboard()["templating"]["list"]}
    assert set(variables) == {"datasource", "model", "version", "window"}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == (
        "datasource",
        "prometheus",
    )
    window = variables["window"]
    assert window["query"] == "5m,1h,1d"
    assert [o["value"] for o in window["options"] if o["selected"]] == ["1h"]
    for name in ("model", "version"):
        names = set(NAME.findall(variables[name]["query"]["query"]))
        assert names == {"uq_predictions_total"}
        assert variables[name]["includeAll"]
    used = set(re.findall(r"\$(\w+)", " ".join(t["expr"] for p in panels() for t in p["targets"])))
    assert used == {"model", "version", "window"}


@pytest.mark.parametrize("options", OPTIONS, ids=["shipped", "quick"])
def test_every_expression_parses(options, tmp_path):
    """promtool reads each as a rule of its own."""
    rules = [{"record": f"e:{i}:x", "expr": e} for i, e in enumerate(expressions(options))]
    text = yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]})
    (tmp_path / "rules.yml").write_text(text)
    promtool(tmp_path, "check", "rules", "rules.yml")


@pytest.mark.parametrize("options", OPTIONS, ids=["shipped", "quick"])
def test_every_expression_names_what_is_registered_or_recorded(options):
    recorded = {r["record"] for r in all_rules(rules_text(options)) if "record" in r}
    for expression in expressions(options):
        names = set(NAME.findall(expression))
        assert names, expression
        assert names <= recorded | METRIC_NAMES, names - recorded - METRIC_NAMES


def test_what_is_recorded_is_read_by_a_rule_an_alert_or_a_panel():
    rules = all_rules(rules_text())
    texts = [r["expr"] for r in rules] + expressions(Options())
    read = {name for text in texts for name in NAME.findall(text)}
    left = {r["record"] for r in rules if "record" in r} - read
    # More percentiles than the panels show, the share of empty sets, and what the ledger wrote.
    assert {re.sub(r"(5m|1h|1d)$", "", name) for name in left} == {
        "route:uq_request_duration_seconds:p95_rate",
        "stage:uq_stage_duration_seconds:p50_rate",
        "stage:uq_stage_duration_seconds:p95_rate",
        "model_version_level:uq_set_size:empty_ratio_increase",
        "instance:uq_ledger_written:increase",
        "instance:uq_ledger_write_errors:increase",
    }


def test_label_coverage_by_bin_stands_beside_calibration_over_the_longest_window():
    (panel,) = [p for p in panels() if p["type"] == "bargauge"]
    assert "model_version_bin:uq_label_coverage:ratio_increase1d" in panel["targets"][0]["expr"]
