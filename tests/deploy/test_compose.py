"""deploy/compose.yaml: what the compose specification allows, and in agreement with the image."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from service.alerting import Options
from tests.deploy.composed import DEPLOY, faults, mounts, read_compose
from tests.service.alerting.promtool import promtool

COMPOSE = read_compose()
SCHEMA = json.loads(
    (files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text()
)
Change = Callable[[dict[str, Any]], object]


def broken(change: Change) -> dict[str, Any]:
    """The file with one change, which works on its services."""
    compose = copy.deepcopy(COMPOSE)
    change(compose["services"])
    return compose


def schema_faults(compose: dict[str, Any]) -> list[str]:
    validator = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)
    return [e.message for e in validator.iter_errors(compose)]


def test_the_compose_specification_allows_it() -> None:
    assert schema_faults(COMPOSE) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["hedged"].update(read_onli=True),
        lambda s: s["hedged"]["depends_on"].update(postgres={"condition": "healthy"}),
        lambda s: s["postgres"]["healthcheck"].update(intervall="5s"),
        lambda s: s["monitor"].update(ports="127.0.0.1:9464:9464"),
        lambda s: s["grafana"].update(deploy={"resources": {"limits": {"memroy": "1G"}}}),
    ],
)
def test_the_specification_refuses_a_broken_copy(change: Change) -> None:
    assert schema_faults(broken(change))


def test_it_agrees_with_itself_the_image_and_the_settings() -> None:
    assert faults(COMPOSE) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: s["grafana"].pop("read_only"), "grafana: its root can be written to"),
        (lambda s: s["postgres"].update(cap_add=["CHOWN"]), "postgres: it has capabilities"),
        (lambda s: s["monitor"].pop("security_opt"), "monitor: it may gain privileges"),
        (lambda s: s["hedged"].pop("restart"), "hedged: it is not started again"),
        (lambda s: s["hedged"].pop("logging"), "hedged: its log grows without bound"),
        (lambda s: s["hedged"].pop("deploy"), "hedged: it has no limits"),
        (
            lambda s: s["prometheus"].pop("healthcheck"),
            "prometheus: nobody asks whether it is well",
        ),
        (
            lambda s: s["postgres"]["environment"].update(POSTGRES_PASSWORD="x"),
            "postgres: POSTGRES_PASSWORD is a secret in the open",
        ),
        (
            lambda s: s["hedged"]["environment"].update(
                HEDGED_LEDGER="postgresql://a:b@postgres/c"
            ),
            "hedged: HEDGED_LEDGER has a password in it",
        ),
        (
            lambda s: s["grafana"].update(image="grafana/grafana:latest"),
            "grafana: grafana/grafana:latest names no one version",
        ),
        (
            lambda s: s["hedged"].update(image="hedged:0.0.9"),
            "hedged: hedged:0.0.9 is not version",
        ),
        (
            lambda s: s["hedged"].update(build={"context": ".."}),
            "hedged: it is not built from the Dockerfile's target cpu",
        ),
        (
            lambda s: s["hedged"].update(ports=["3000:3000"]),
            "hedged: 3000:3000 can be reached from other machines",
        ),
        (
            lambda s: s["hedged"].update(ports=["127.0.0.1:3000:3001"]),
            "hedged: 127.0.0.1:3000:3001: the image listens on 3000",
        ),
        (lambda s: s["hedged"]["networks"].append("out"), "hedged: no networks out"),
        (lambda s: s["grafana"]["volumes"].append("x:/x"), "grafana: no volume x"),
        (
            lambda s: s["grafana"]["volumes"].append("./dashboards:/x:ro"),
            "grafana: no ./dashboards to mount",
        ),
        (
            lambda s: s["hedged"]["volumes"].__setitem__(1, "keys:/keys"),
            "hedged: no volume keys",
        ),
        (
            lambda s: s["monitor"].update(secrets=[]),
            "monitor: /run/secrets/ledger is not mounted",
        ),
        (lambda s: s["hedged"].update(tmpfs=[]), "hedged: /tmp/bentoml is not mounted"),
        (
            lambda s: s["monitor"]["volumes"].pop(),
            "monitor: /data/monitor.json is not mounted",
        ),
        (
            lambda s: s["monitor"]["depends_on"].update(hedged={"condition": "service_started"}),
            "monitor: it does not wait until hedged is well",
        ),
        (lambda s: s["grafana"].update(networks=["ledger"]), "grafana: it cannot reach prometheus"),
        (
            lambda s: s["hedged"].update(stop_grace_period="30s"),
            "hedged: it is killed before the 35 s",
        ),
        (
            lambda s: s["hedged"]["environment"].update(HEDGED_WORKERS="4"),
            "hedged: 8 threads on 2 cores",
        ),
    ],
)
def test_each_disagreement_is_found(change: Change, fault: str) -> None:
    found = faults(broken(change))
    assert any(f.startswith(fault) for f in found), found


def test_what_prometheus_scrapes_are_services_and_jobs_of_the_rules() -> None:
    config = yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text())
    services = COMPOSE["services"]
    scraped = {job["job_name"]: job["static_configs"] for job in config["scrape_configs"]}
    for static in [*scraped.values(), config["alerting"]["alertmanagers"][0]["static_configs"]]:
        (target,) = static[0]["targets"]
        assert "watch" in services[target.partition(":")[0]]["networks"]
    jobs = Options()
    assert scraped[jobs.job][0]["targets"] == ["hedged:3000"]
    port = next(w for w in services["monitor"]["command"] if w.startswith("--port="))
    assert scraped[jobs.monitor_job][0]["targets"] == [f"monitor:{port.partition('=')[2]}"]
    there = mounts(COMPOSE, services["prometheus"])
    (key,) = {
        job["authorization"]["credentials_file"]
        for job in config["scrape_configs"]
        if "authorization" in job
    }
    assert there[key] == "./secrets/prometheus-key"
    beside = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert config["global"] == beside["global"]
    assert {job["job_name"] for job in beside["scrape_configs"]} <= scraped.keys()


def laid_out(folder: Path, config: str) -> None:
    """Give promtool a folder that has what Prometheus' container has."""
    (folder / "rules.yml").write_text((DEPLOY / "prometheus/rules.yml").read_text())
    (folder / "prometheus-key").write_text("hedged_key\n")
    (folder / "prometheus.yml").write_text(config.replace("/run/secrets/", ""))


def test_promtool_accepts_the_configuration_and_no_broken_one(tmp_path: Path) -> None:
    config = (DEPLOY / "compose/prometheus.yml").read_text()
    laid_out(tmp_path, config)
    promtool(tmp_path, "check", "config", "prometheus.yml")
    for right, wrong in (("rules.yml", "rulez.yml"), ("metrics_path", "metric_path")):
        assert right in config
        laid_out(tmp_path, config.replace(right, wrong))
        with pytest.raises(AssertionError, match=wrong):
            promtool(tmp_path, "check", "config", "prometheus.yml")


def provisioned(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return found


def test_grafana_finds_prometheus_and_its_dashboards() -> None:
    there = mounts(COMPOSE, COMPOSE["services"]["grafana"])
    provisioning = "/etc/grafana/provisioning"
    assert there[f"{provisioning}/datasources/prometheus.yml"] == "./compose/grafana.yml"
    (source,) = provisioned("compose/grafana.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (beside,) = provisioned("grafana/datasources/prometheus.yml")["datasources"]
    assert source | {"url": ""} == beside | {"url": ""}
    (provider,) = yaml.safe_load((DEPLOY / "grafana/dashboards/hedged.yml").read_text())[
        "providers"
    ]
    assert there[provider["options"]["path"]] == "./grafana/dashboards"
    assert provider["folder"]
