"""What lies in deploy/: valid, right on known answers, and what the code makes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from service.alerting.__main__ import FILES
from tests.service.alerting.promtool import DEPLOY, promtool

ROOT = DEPLOY.parent


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
    promtool(DEPLOY / "prometheus", *arguments)


@pytest.mark.parametrize("name", FILES)
def test_what_ships_is_what_the_code_makes(name):
    made = FILES[name]()
    assert (DEPLOY / name).read_text("utf-8") == made, "renew it: python -m service.alerting"


def test_the_module_writes_what_ships(tmp_path):
    run = [sys.executable, "-W", "error", "-m", "service.alerting", str(tmp_path)]
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert written == set(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DEPLOY / name).read_bytes()


def test_grafana_is_pointed_at_what_exists():
    """``deploy/grafana`` is Grafana's folder of provisioning."""
    folder = DEPLOY / "grafana"
    provisioning = "/etc/grafana/provisioning"
    comment = (folder / "datasources" / "prometheus.yml").read_text().splitlines()[1]
    assert f"deploy/grafana:{provisioning}:ro" in comment
    dashboards = yaml.safe_load((folder / "dashboards" / "hedged.yml").read_text())
    assert dashboards["apiVersion"] == 1
    (provider,) = dashboards["providers"]
    assert (provider["type"], provider["allowUiUpdates"]) == ("file", False)
    path = provider["options"]["path"]
    assert path.startswith(f"{provisioning}/")
    found = folder / path.removeprefix(f"{provisioning}/")
    assert [p.name for p in found.glob("*.json")] == ["hedged.json"]
    sources = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())
    (source,) = sources["datasources"]
    assert source["type"] == "prometheus"
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scrape["scrape_interval"]
