"""deploy/alertmanager: checked by amtool, and a real Alertmanager that sends what it is told.

Debian 12 has Alertmanager 0.25, which knows no ``url_file`` yet. Here, and nowhere else, the
address stands in ``url`` instead; that the file's ``url_file`` are the secrets of compose.yaml is
checked by itself.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.composed import DEPLOY, argv, mounts, read_compose
from tests.deploy.image import read_image
from tests.deploy.programs import Program, get

SERVICE = read_compose()["services"]["alertmanager"]


def shipped() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "alertmanager/alertmanager.yml").read_text())
    return found


def with_addresses(config: dict[str, Any], **addresses: str) -> dict[str, Any]:
    """The configuration with each ``url_file`` replaced by what its secret would hold."""
    for receiver in config["receivers"]:
        for hook in receiver["webhook_configs"]:
            name = hook.pop("url_file").rpartition("-")[2]
            hook["url"] = addresses.get(name, "http://127.0.0.1:9")
    return config


def severities() -> set[str]:
    """Those of the shipped alerts."""
    groups = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]
    return {rule["labels"]["severity"] for g in groups for rule in g["rules"] if "alert" in rule}


def amtool(folder: Path, config: dict[str, Any], *words: str) -> str:
    """What amtool prints; AssertionError where it refuses."""
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        ["amtool", *words], cwd=folder, check=False, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_amtool_accepts_the_configuration_and_no_broken_one(tmp_path: Path) -> None:
    check = ("check-config", "alertmanager.yml")
    assert "SUCCESS" in amtool(tmp_path, with_addresses(shipped()), *check)
    nobody = with_addresses(shipped())
    nobody["route"]["routes"][0]["receiver"] = "nobody"
    misspelt = with_addresses(shipped())
    misspelt["receivers"][0]["webhook_configs"][0]["send_resolve"] = True
    matcher = with_addresses(shipped())
    matcher["route"]["routes"][0]["matchers"] = ["severity critical"]
    for broken in (nobody, misspelt, matcher):
        with pytest.raises(AssertionError, match=r"FAILED|undefined receiver"):
            amtool(tmp_path, broken, *check)


def test_every_severity_has_a_receiver_and_nothing_is_lost(tmp_path: Path) -> None:
    route = ("config", "routes", "test", "--config.file=alertmanager.yml")
    config = with_addresses(shipped())
    assert severities() == {"critical", "warning"}
    for labels, receiver in (
        ("severity=critical", "on-call"),
        ("severity=warning", "model-owners"),
        ("severity=page", "on-call"),
        ("alertname=x", "on-call"),
    ):
        assert amtool(tmp_path, config, *route, labels) == receiver


def test_each_address_is_a_secret_of_its_own() -> None:
    there = mounts(read_compose(), SERVICE)
    files = [h["url_file"] for r in shipped()["receivers"] for h in r["webhook_configs"]]
    assert [there[file] for file in files] == [
        "./secrets/alerts-critical",
        "./secrets/alerts-warning",
    ]


@contextmanager
def webhooks() -> Iterator[tuple[int, queue.Queue[tuple[str, dict[str, Any]]]]]:
    """A port of this machine, and what is posted to it: path and message."""
    posted: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            posted.put((self.path, json.loads(self.rfile.read(length))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, posted
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_alerts_arrive_where_their_severity_says(tmp_path: Path) -> None:
    with webhooks() as (port, posted):
        hooks = {name: f"http://127.0.0.1:{port}/{name}" for name in ("critical", "warning")}
        config = with_addresses(shipped(), **hooks)
        config["route"]["group_wait"] = "10ms"  # a test need not wait for others of a group
        (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump(config))
        words = [
            w.replace("/etc/alertmanager", str(tmp_path)).replace("=/alert", f"={tmp_path}/alert")
            for w in argv(SERVICE, read_image())
        ]
        words += ["--web.listen-address=127.0.0.1:0"]
        with Program(["prometheus-alertmanager", *words], tmp_path / "log") as program:
            url = f"http://127.0.0.1:{program.port()}"
            program.answers(f"{url}/-/ready")
            sent = [
                {"labels": {"alertname": f"UQ{severity}", "severity": severity}}
                for severity in (*sorted(severities()), "other")
            ]
            assert get(f"{url}/api/v2/alerts", body=json.dumps(sent).encode())[0] == 200
            arrived = [posted.get(timeout=20) for _ in sent]
    got = {(path, m["commonLabels"]["severity"], m["status"]) for path, m in arrived}
    assert got == {
        ("/critical", "critical", "firing"),
        ("/warning", "warning", "firing"),
        ("/critical", "other", "firing"),
    }
