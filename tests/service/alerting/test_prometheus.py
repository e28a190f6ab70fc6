"""A real Prometheus that scrapes two real workers, under rules with windows of seconds."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from calibration.bundle import load_bundle
from calibration.predictor import Predictor
from hedged.demo.server import Server
from service.alerting import Options, rules_text
from tests.factory import rows
from tests.service.alerting.test_dashboard import expressions
from tests.service.helpers import poll

N, BATCH, NAME = 4000, 100, "tiny"
OPTIONS = Options(
    windows=("5s", "30s", "5m"),
    alert_windows=("5m",),
    interval="1s",
    for_="2s",
    service_for="2s",
    min_labels=1000,
    label_silence="5m",
)


class Prometheus:
    """``prometheus`` on a port of the system's choice, scraping one address every second."""

    def __init__(self, folder: Path, target: str, rules: str) -> None:
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [{"job_name": "hedged", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "rules.yml").write_text(rules)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = folder / "prometheus.log"
        arguments = ("--config.file=prometheus.yml", f"--storage.tsdb.path={folder / 'data'}")
        with self.log.open("wb") as log:
            self.process = psutil.Popen(
                ["prometheus", *arguments, "--web.listen-address=127.0.0.1:0"],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Prometheus:
        try:
            (self.port,) = poll(self._ports, lambda ports: len(ports) == 1)
            poll(self._ready, bool)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except psutil.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)

    def _ports(self) -> list[int]:
        assert self.process.is_running(), self.log.read_text()
        found = self.process.net_connections("tcp4")
        return [c.laddr.port for c in found if c.status == psutil.CONN_LISTEN]

    def _ready(self) -> bool:
        try:
            url = f"http://127.0.0.1:{self.port}/-/ready"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False

    def api(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            found = json.loads(answer.read())
        assert found["status"] == "success"
        return found["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        found = self.api("query", query=expression)["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    def value(self, expression: str) -> float | None:
        """The one value of an expression, None where it has none."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return found[0][1] if found else None


@dataclass(frozen=True)
class Told:
    prometheus: Prometheus
    server: Server
    fields: dict[str, np.ndarray]
    y: np.ndarray
    conformal_rows: int


@pytest.fixture(scope="module")
def told(classification_bundle, tmp_path_factory):
    """What two workers served and were told, all of it scraped; half of the labels are wrong."""
    x, y = rows("classification", N, 11)
    y = np.where(np.arange(N) % 2, (y + 1) % 3, y)
    specs = Predictor(classification_bundle).inputs
    folder = tmp_path_factory.mktemp("scraped")
    (folder / "prometheus").mkdir()
    with (
        Server(classification_bundle, folder, threads=1, workers=2) as server,
        Prometheus(
            folder / "prometheus", f"127.0.0.1:{server.port}", rules_text(OPTIONS)
        ) as prometheus,
    ):
        # Series of 0 are scraped before the first label.
        total = "sum(uq_labeled_predictions_total)"
        poll(lambda: prometheus.value(total), lambda value: value == 0)

        def tell(start: int) -> dict[str, np.ndarray]:
            part = slice(start, start + BATCH)
            found = server.infer(NAME, {"x": x[part]}, specs, f"b{start}")
            server.label({f"b{start}:{i}": int(y[start + i]) for i in range(BATCH)})
            return found

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(tell, range(0, N, BATCH)))
        poll(lambda: prometheus.value(total), lambda value: value == N)
        fields = {k: np.concatenate([a[k] for a in answers]) for k in answers[0]}
        manifest = load_bundle(classification_bundle).manifest
        yield Told(prometheus, server, fields, y, manifest.conformal.guarantees[0].n)


def expected(told: Told) -> dict[str, float]:
    f, y = told.fields, told.y
    confidence = f["confidence"].astype(np.float64)
    right = (f["label"] == y).astype(np.float64)
    index = np.ceil(confidence * 20 - 1e-12).astype(int)
    gaps = [abs(float((right - confidence)[index == i].sum())) for i in range(21)]
    return {
        "ece": sum(gaps) / N,
        "coverage": float(f["set"][np.arange(N), y].mean()),
        "accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
        "size": float(f["set_size"].mean()),
    }


def test_both_workers_count(told):
    pids = {p.stem.split("_")[-1] for p in told.server.folder.glob("**/counter_*.db")}
    assert len(pids) >= 2


def test_raw_counters_are_numpys(told):
    want = expected(told)
    ece = (
        "sum(abs(sum by (bin) (uq_labeled_confidence_sum_total) - sum by (bin)"
        " (uq_labeled_correct_total))) / sum(uq_labeled_predictions_total)"
    )
    level = '{level="0.9"}'
    inside, sets = f"uq_interval_covered_total{level}", f"uq_interval_labeled_total{level}"
    queries = {
        "ece": ece,
        "coverage": f"sum({inside}) / sum({sets})",
        "accuracy": "sum(uq_labeled_correct_total) / sum(uq_labeled_predictions_total)",
        "confidence": "sum(uq_expected_correct_total) / sum(uq_labeled_predictions_total)",
        "size": f"sum(uq_set_size_sum{level}) / sum(uq_set_size_count{level})",
    }
    for name, query in queries.items():
        assert told.prometheus.value(query) == pytest.approx(want[name], abs=1e-9), name
    assert told.prometheus.value("uq_conformal_rows") == told.conformal_rows


def test_recorded_figures_are_within_two_percent_of_numpys(told):
    """Over the minutes that hold every label: ``increase`` extrapolates, its ratios do not."""
    want, level = expected(told), '{level="0.9"}'
    figures = {
        "model_version:uq_expected_calibration_error:ratio_increase5m": want["ece"],
        f"model_version_level:uq_interval_coverage:ratio_increase5m{level}": want["coverage"],
        "model_version:uq_accuracy:ratio_increase5m": want["accuracy"],
        "model_version:uq_expected_accuracy:ratio_increase5m": want["confidence"],
        f"model_version_level:uq_set_size:mean_increase5m{level}": want["size"],
        f"model_version_level:uq_interval_level:ratio{level}": 0.9,
        "model_version:uq_label_coverage:ratio_increase5m": 1.0,
    }
    for name, value in figures.items():
        near = pytest.approx(value, rel=0.02)
        poll(lambda name=name: told.prometheus.value(name), lambda found, near=near: found == near)


def test_rows_by_bin_are_those_of_the_real_exposition(told):
    """The edges that rules name are written as the service writes them: every row has a label, so
    every bin that has rows is covered."""
    index = np.ceil(told.fields["confidence"].astype(np.float64) * 20 - 1e-12).astype(int)
    filled = {f"{i / 20:.2f}" for i in np.unique(index)}
    record = "model_version_bin:uq_label_coverage:ratio_increase5m"

    def found() -> dict[str, float]:
        return {labels["bin"]: value for labels, value in told.prometheus.query(record)}

    near = pytest.approx(dict.fromkeys(filled, 1.0), rel=0.02)
    poll(found, lambda bins: bins == near)
    text = told.server.request("/metrics").decode()
    edges = {
        s.labels["le"]
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name == "uq_confidence_bucket"
    }
    rules = rules_text(OPTIONS)
    assert all(f'le="{edge}"' in rules for edge in edges - {"+Inf"})
    assert len(edges) == 21


def test_alerts_fire_on_labels_that_are_wrong(told):
    """Half of the labels are another class: calibration and coverage are gone, the rest is well."""

    def firing() -> set[tuple[str, str]]:
        return {
            (alert["labels"]["alertname"], alert["labels"].get("window", ""))
            for alert in told.prometheus.api("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    wanted = {("UQCalibrationDegraded", "5m"), ("UQCoverageLow", "5m")}
    found = poll(firing, lambda alerts: wanted <= alerts)
    # On a busy machine it may well be slow to answer.
    late = {"UQTargetDown", "UQTargetAbsent", "UQQueueSlow"}
    assert {alert for alert in found if alert[0] not in late} == wanted
    (alert, *_) = [
        a
        for a in told.prometheus.api("alerts")["alerts"]
        if a["labels"]["alertname"] == "UQCoverageLow"
    ]
    assert alert["labels"]["model"] == NAME
    assert alert["annotations"]["summary"].startswith(f"{NAME} ")
    assert "at level 0.9" in alert["annotations"]["summary"]


def test_prometheus_evaluates_every_rule_and_every_panel(told):
    rules = [rule for group in told.prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 200
    assert {(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] == "err"} == (
        set()
    )
    for expression in expressions(OPTIONS):
        told.prometheus.query(expression)
