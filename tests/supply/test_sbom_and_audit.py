"""The bill of materials names what is locked and nothing else; the audit finds a vulnerability that
a service knows, and does not pass where the service knows nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from deploy import supply
from tests.supply.dockerfile import ROOT
from tests.supply.lockfile import parse


@pytest.fixture(scope="module")
def bills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bill of each lock file, as the command writes it; it is validated once, below."""
    out = tmp_path_factory.mktemp("sbom")
    done = subprocess.run(
        [sys.executable, ROOT / "deploy/supply.py", "sbom", "--out", out, "--no-validate"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    return {path.name.removesuffix(".cdx.json"): path.read_text("utf-8") for path in paths}


@pytest.mark.parametrize("lock", supply.LOCKS, ids=lambda path: path.stem)
def test_the_bill_lists_exactly_what_is_locked(bills: dict[str, str], lock: Path) -> None:
    record = json.loads(bills[lock.stem])
    listed = {
        (c["name"], c["version"], c["purl"]): {
            h["content"] for r in c["externalReferences"] for h in r.get("hashes", [])
        }
        for c in record["components"]
    }
    entries = parse(lock.read_text("utf-8"))
    assert listed == {
        (e.name, e.version, f"pkg:pypi/{e.name}@{e.version}"): set(e.hashes) for e in entries
    }
    assert len(record["components"]) == len(entries) > 80
    project = record["metadata"]["component"]
    assert (project["name"], project["type"]) == ("hedged", "application")


def test_the_bill_is_cyclonedx_and_names_no_machine(bills: dict[str, str]) -> None:
    text = bills["serve-cuda"]
    broken = json.loads(text)
    del broken["components"][0]["name"]
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(json.dumps(broken)) is not None
    assert str(ROOT) not in text


def test_the_bill_is_the_same_every_time(bills: dict[str, str], tmp_path: Path) -> None:
    assert supply.main(["sbom", "--out", str(tmp_path), "--no-validate"]) == 0
    for name, text in bills.items():
        assert (tmp_path / f"{name}.cdx.json").read_text("utf-8") == text


class Service:
    """A vulnerability service of OSV's protocol on loopback, that knows what it is told."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], str] = {}
        self.asked: set[tuple[str, str]] = set()
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                found = outer.answer(query)
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(json.dumps(found).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        name, version = query["package"]["name"], query["version"]
        self.asked.add((name, version))
        if (name, version) not in self.known:
            return {}
        package = {"name": name, "ecosystem": "PyPI"}
        affected = [{"package": package, "ranges": [], "versions": [version]}]
        return {
            "vulns": [
                {"id": self.known[name, version], "summary": "It leaks.", "affected": affected}
            ]
        }


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    service.thread.start()
    yield service
    service.server.shutdown()
    service.thread.join()
    service.server.server_close()


def audit(service: Service, folder: Path, *options: str) -> tuple[int, str]:
    port = service.server.server_address[1]
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "deploy/supply.py", "audit", "--vulnerability-service", "osv"),
            *("--osv-url", f"http://127.0.0.1:{port}/v1/query", "--cache-dir", folder, *options),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_known_vulnerability_is_found(service: Service, tmp_path: Path) -> None:
    code, text = audit(service, tmp_path)
    assert code == 0 and "No known vulnerabilities found" in text
    entries = {e.name: e for lock in supply.LOCKS for e in parse(lock.read_text("utf-8"))}
    assert {name for name, _ in service.asked} == set(entries)
    assert service.asked == {(e.name, e.version) for e in entries.values()}
    aiohttp = entries["aiohttp"]
    service.known[aiohttp.name, aiohttp.version] = "PYSEC-2099-1"
    code, text = audit(service, tmp_path)
    assert code == 1 and "PYSEC-2099-1" in text and "aiohttp" in text
    code, _ = audit(service, tmp_path, "--ignore-vuln", "PYSEC-2099-1")
    assert code == 0


def test_a_service_that_fails_is_no_pass(service: Service, tmp_path: Path) -> None:
    service.status = 500
    assert audit(service, tmp_path)[0] != 0


def test_a_package_that_nothing_is_known_of_is_no_pass() -> None:
    assert "--strict" in supply.audit_command([])
    assert "--require-hashes" in supply.audit_command([])
