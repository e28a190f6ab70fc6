"""An incident from its first row to its end, with real processes: traffic drifts, the monitor sees
it before any label, coverage is missed when labels come, the bundle is recalibrated on them and
activated, coverage returns, and every alert clears."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from calibration.predictor import Predictor
from hedged.demo.server import Server
from service.alerting import Options, rules_text
from tests.factory import version_of
from tests.walks.incident import Monitor, Prometheus, Traffic, wait_for

OPTIONS = Options(
    windows=("10s", "20s"),
    alert_windows=("20s",),
    interval="1s",
    for_="2s",
    service_for="30s",
    min_labels=300,
    label_silence="10m",
    monitor_lag="5m",
)
EVIDENCE = "UQNotExchangeable"  # false once in a thousand healthy streams, ever
BY_CHANCE = {"UQDriftDetected"}  # a change point is found where nothing changed, now and then
COVERAGE = {"UQCoverageLow", "UQCoverageBroken"}


def hedged(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "hedged", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names(prometheus: Prometheus, version: str) -> set[str]:
    return {name for name, of in prometheus.firing() if of == version}


def judged(prometheus: Prometheus, version: str) -> bool:
    """Whether the window holds enough labels of a version for the alerts to judge it."""
    series = (
        f'model_version_level:uq_interval_labeled:increase20s{{level="0.9",version="{version}"}}'
    )
    return (prometheus.value(series) or 0) >= OPTIONS.min_labels


def test_an_incident(
    classification_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    version_of(classification_bundle, root, "tiny", "1")
    ledger = tmp_path / "server" / "hedged-ledger.sqlite"
    specs = Predictor(classification_bundle).inputs
    looking = ("--every", "0.5", "--lag", "1", "--reference", "1000", "--window", "20s")
    with (
        Server(root, tmp_path / "server", threads=1) as server,
        Monitor(ledger, tmp_path, *looking) as monitor,
        Prometheus(
            tmp_path / "prometheus",
            rules_text(OPTIONS),
            {"hedged": server.url.removeprefix("http://"), "hedged-monitor": monitor},
        ) as prometheus,
        Traffic(server, specs) as traffic,
    ):
        learnt = 'min(uq_drift_martingale_log10{version="1",stream!="error"})'
        wait_for("a reference", lambda: prometheus.value(learnt) is not None, traffic)
        wait_for("a window of labels", lambda: judged(prometheus, "1"), traffic)
        assert names(prometheus, "1") <= BY_CHANCE  # healthy, and judged

        traffic.labels = False
        traffic.drifted = True
        since = time.monotonic()
        wait_for("a drift alert", lambda: EVIDENCE in names(prometheus, "1"), traffic)
        changed = 'sum(uq_changepoints_total{version="1",stream!="error"})'
        wait_for("a change point", lambda: (prometheus.value(changed) or 0) > 0, traffic)
        assert not names(prometheus, "1") & COVERAGE

        traffic.labels = True  # with all that were held back
        wait_for("a coverage alert", lambda: bool(names(prometheus, "1") & COVERAGE), traffic)
        missed = np.mean(traffic.covered["1"][-1000:])
        assert missed < 0.85

        # Rows of before are like none that come: with some of them, version 2 would miss too much.
        wait_for("rows to renew with", lambda: time.monotonic() - since >= 8, traffic)
        age = f"{int(time.monotonic() - since)}s"
        renewed = root / "tiny" / "2"
        hedged(
            *("recalibrate", str(root / "tiny" / "1"), "--ledger", str(ledger)),
            *("--since", age, "--version", "2", "-o", str(renewed)),
        )
        hedged("verify", str(renewed))
        hedged("activate", str(root), "tiny", "2")
        wait_for("version 2", lambda: len(traffic.covered.get("2", [])) > 2000, traffic)
        wait_for("a window of its labels", lambda: judged(prometheus, "2"), traffic)
        wait_for(
            "all clear",
            lambda: {name for name, _ in prometheus.firing()} <= BY_CHANCE,
            traffic,
            prometheus.firing,
        )
        covered = traffic.covered["2"]
        assert 0.87 < np.mean(covered) < 0.93
        served = json.loads(server.request("/v2/models/tiny"))
        assert served["versions"] == ["2"]
