"""The containers of deploy/compose.yaml as processes of this machine: what they run and in which
environment is read from the file; only paths, addresses and ports of the containers are mapped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from service.bundles import write_active
from service.settings import SettingsError, load_settings
from tests.deploy.composed import argv, environment, mounts, read_compose
from tests.deploy.image import read_image
from tests.deploy.programs import Program, get
from tests.factory import version_of
from tests.ports import held_port
from tests.service.helpers import poll

COMPOSE, IMAGE = read_compose(), read_image()
NAME = "tiny"
ROWS = json.dumps({"rows": [dict.fromkeys("abcd", 0.1 * i) for i in range(50)]}).encode()


@dataclass(frozen=True)
class Host:
    """This machine in place of Docker's: where what the containers mount lies."""

    folder: Path
    deploy: Path
    bundles: Path

    def mapped(self, service: str, text: str) -> str:
        """What a container calls so, by its name here."""
        for target, source in mounts(COMPOSE, COMPOSE["services"][service]).items():
            if source.startswith("./"):
                here = self.deploy / source
            else:
                here = self.bundles if source else self.folder / service / target.strip("/")
            text = re.sub(rf"(?<![\w/]){re.escape(target)}(?=/|$)", str(here), text)
        return text

    def argv(self, service: str) -> list[str]:
        return [self.mapped(service, w) for w in argv(COMPOSE["services"][service], IMAGE)]

    def environment(self, service: str) -> dict[str, str]:
        """What the container has, its paths mapped; beside it what any process needs here."""
        given = environment(COMPOSE["services"][service], IMAGE)
        for path in (self.folder / service / name for name in ("data", "tmp/bentoml")):
            path.mkdir(parents=True, exist_ok=True)
        return {k: self.mapped(service, v) for k, v in given.items()} | {"PATH": os.environ["PATH"]}

    def key(self, name: str, roles: str) -> str:
        """Make a key, by the command that the guide names."""
        keys = self.deploy / "secrets/keys/keys.json"
        command = ["keys", "add", str(keys), name, "--role", roles]
        return subprocess.check_output([*HEDGED, *command], text=True).strip()


HEDGED = (sys.executable, "-m", "hedged")


@pytest.fixture(scope="module")
def host(
    deployed: Path,
    postgres: Any,
    classification_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Host:
    """Two versions of a model, of which 1 is live, and the ledger's database and user, reached by
    the file that secrets.sh made, but over a socket."""
    folder = tmp_path_factory.mktemp("containers")
    for version in ("1", "2"):
        version_of(classification_bundle, folder / "bundles", NAME, version)
    write_active(folder / "bundles" / NAME, "1")
    service = deployed / "secrets/ledger.conf"
    (password,) = re.findall(r"^password=(.*)$", service.read_text(), re.M)
    postgres.psql(f"CREATE USER hedged PASSWORD '{password}'")
    postgres.psql("CREATE DATABASE hedged OWNER hedged")
    (directory,) = parse_qs(urlsplit(postgres.get_uri()).query)["host"]
    service.write_text(service.read_text().replace("host=postgres", f"host={directory}"))
    return Host(folder, deployed, folder / "bundles")


@dataclass(frozen=True)
class Served:
    host: Host
    port: int
    client: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def served(host: Host) -> Iterator[Served]:
    """The container `hedged`, on loopback and another port."""
    client = host.key("web", "predict,labels")
    given = host.environment("hedged")
    assert given["HEDGED_HOST"] == "0.0.0.0"
    words = host.argv("hedged")
    assert words[:2] == ["hedged", "serve"]
    words, log = [*HEDGED, *words[1:]], host.folder / "hedged.log"
    with held_port() as port:
        given |= {"HEDGED_HOST": "127.0.0.1", "HEDGED_PORT": str(port)}
        with Program(words, log, given) as program:
            program.answers(f"http://127.0.0.1:{port}/readyz")
            yield Served(host, port, client)
            # Twice: the second signal skips what is left of the drain.
            program.process.send_signal(signal.SIGTERM)
            poll(lambda: get(f"http://127.0.0.1:{port}/readyz")[0], lambda status: status == 503)
            program.process.send_signal(signal.SIGTERM)
            assert program.process.wait(60) == 0, program.log.read_text()


def check(argv: list[str], port: int, **environ: str) -> int:
    """The exit code of a health check, asking ``port`` in place of its own."""
    words = [re.sub(r"(?<=127\.0\.0\.1:)\d+", str(port), w) for w in argv]
    words[0] = {"python": sys.executable}[words[0]]
    return subprocess.run(words, env=environ, capture_output=True, timeout=30).returncode


def test_health_is_asked_of_what_answers(served: Served) -> None:
    for path in ("/readyz", "/livez", "/v2/health/ready", "/v2/health/live"):
        assert get(served.url + path)[0] == 200, path
    assert check(IMAGE.health, 0, HEDGED_PORT=str(served.port)) == 0
    with held_port() as port:
        assert check(IMAGE.health, 0, HEDGED_PORT=str(port)) != 0


def test_every_request_needs_a_key_and_its_role(served: Served) -> None:
    predict, metrics = f"{served.url}/v1/predict", f"{served.url}/metrics"
    scraper = (served.host.deploy / "secrets/prometheus-key").read_text().strip()
    assert get(predict, None, ROWS)[0] == 401
    assert get(predict, served.client, ROWS)[0] == 200
    assert get(metrics)[0] == 401
    assert get(metrics, served.client)[0] == 403
    assert get(metrics, scraper)[0] == 200


def test_without_keys_the_container_does_not_start(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [k for k in os.environ if k.startswith("HEDGED_")]:
        monkeypatch.delenv(name)
    given = {k: v for k, v in host.environment("hedged").items() if k.startswith("HEDGED_")}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert load_settings().keys is not None
    monkeypatch.setenv("HEDGED_KEYS", str(host.folder / "none.json"))
    with pytest.raises(SettingsError, match="make one with hedged keys add"):
        load_settings()
    monkeypatch.delenv("HEDGED_KEYS")
    with pytest.raises(SettingsError, match=r"0\.0\.0\.0 can be reached .*hedged keys add"):
        load_settings()
    monkeypatch.setenv("HEDGED_KEYSS", "x")
    with pytest.raises(SettingsError, match="unknown setting HEDGED_KEYSS"):
        load_settings()


def test_what_is_activated_on_the_host_is_served(served: Served) -> None:
    """The bundles are mounted as a folder, so that another active.json is seen; all can read it."""

    def live() -> str:
        status, body = get(f"{served.url}/v2/models/{NAME}", served.client)
        assert status == 200
        return str(json.loads(body)["versions"])

    assert live() == "['1']"
    command = ["activate", str(served.host.bundles), NAME, "2"]
    subprocess.run([*HEDGED, *command], check=True, capture_output=True, timeout=60)
    poll(live, lambda found: found == "['2']")
    files = [p for p in served.host.bundles.rglob("*") if p.is_file()]
    assert len(files) > 10 and all(p.stat().st_mode & 0o004 for p in files)


@pytest.fixture(scope="module")
def monitored(served: Served) -> Iterator[int]:
    """The container `monitor`, on loopback and a port of the system's choice."""
    host = served.host
    words = [w.replace("0.0.0.0", "127.0.0.1") for w in host.argv("monitor")]
    (port,) = [w for w in words if w.startswith("--port=")]
    words[words.index(port)] = "--port=0"
    words += ["--every=0.2", "--lag=0"]  # nobody waits for rows that come late
    log = host.folder / "monitor.log"
    with Program([*HEDGED, *words[1:]], log, host.environment("monitor")) as program:
        found = program.port()
        program.answers(f"http://127.0.0.1:{found}/metrics")
        yield found
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(30) == 0, program.log.read_text()
        assert (host.folder / "monitor/data/monitor.json").is_file()


def test_the_monitor_reads_what_the_service_wrote(served: Served, monitored: int) -> None:
    assert get(f"{served.url}/v1/predict", served.client, ROWS)[0] == 200

    def rows() -> list[str]:
        text = get(f"http://127.0.0.1:{monitored}/metrics")[1].decode()
        return re.findall(rf'^uq_monitor_rows_total\{{model="{NAME}".*?\}} (\S+)$', text, re.M)

    poll(rows, lambda found: sum(map(float, found)) >= 50)
    health = COMPOSE["services"]["monitor"]["healthcheck"]["test"]
    assert health[0] == "CMD"
    assert check(health[1:], monitored) == 0
    with held_port() as port:
        assert check(health[1:], port) != 0


def test_nobody_sees_the_password_of_the_ledger(served: Served, monitored: int) -> None:
    host = served.host
    password = (host.deploy / "secrets/postgres-password").read_text()
    assert password in (host.deploy / "secrets/ledger.conf").read_text()
    for service in ("hedged", "monitor"):
        assert password not in str(host.environment(service)) + str(host.argv(service))
        assert password not in (host.folder / f"{service}.log").read_text()


def test_prometheus_sees_every_target(served: Served, monitored: int, deployed: Path) -> None:
    host = served.host
    folder = host.folder / "prometheus"
    folder.mkdir()
    config = yaml.safe_load((deployed / "compose/prometheus.yml").read_text())
    addresses = {"hedged:3000": served.port, "monitor:9464": monitored}
    config["scrape_configs"] = [
        job for job in config["scrape_configs"] if job["job_name"] != "alertmanager"
    ]
    for job in config["scrape_configs"]:
        (target,) = job["static_configs"][0]["targets"]
        job["static_configs"][0]["targets"] = [f"127.0.0.1:{addresses[target]}"]
        if "authorization" in job:
            name = job["authorization"]["credentials_file"]
            job["authorization"]["credentials_file"] = host.mapped("prometheus", name)
    del config["alerting"]  # test_alertmanager.py
    config["global"]["scrape_interval"] = "1s"  # from file to file only how long this takes
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "rules.yml").write_text((deployed / "prometheus/rules.yml").read_text())
    words = [
        w.replace("/etc/prometheus", str(folder)).replace("=/prometheus", f"={folder}/data")
        for w in argv(COMPOSE["services"]["prometheus"], IMAGE)
    ]
    words += ["--web.listen-address=127.0.0.1:0"]
    with Program(["prometheus", *words], folder / "log") as program:
        url = f"http://127.0.0.1:{program.port()}"
        program.answers(f"{url}/-/ready")

        def asked(path: str) -> Any:
            return json.loads(get(f"{url}/api/v1/{path}")[1])["data"]

        def up() -> dict[str, str]:
            found = asked("targets?state=active")["activeTargets"]
            return {t["labels"]["job"]: t["health"] for t in found}

        poll(up, lambda found: found == {"hedged": "up", "hedged-monitor": "up"})
        groups = asked("rules")["groups"]
        wanted = yaml.safe_load((deployed / "prometheus/rules.yml").read_text())["groups"]
        assert {g["name"] for g in groups} == {g["name"] for g in wanted}
