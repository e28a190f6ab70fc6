"""deploy/secrets.sh: what compose.yaml mounts, readable there and closed to others here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from service.keys import hash_token, read_keys
from tests.deploy.composed import DEPLOY, read_compose
from tests.deploy.conftest import CRITICAL, WARNING, make_secrets


def contents(deployed: Path) -> dict[str, str]:
    return {name: (deployed / file).read_text() for name, file in secret_files().items()}


def secret_files() -> dict[str, str]:
    return {name: one["file"] for name, one in read_compose()["secrets"].items()}


def test_it_makes_every_file_that_is_mounted(deployed: Path) -> None:
    found = contents(deployed)
    assert found["alerts-critical"].strip() == CRITICAL
    assert found["alerts-warning"].strip() == WARNING
    passwords = [found["postgres-password"], found["grafana-password"]]
    assert len(set(passwords)) == 2
    for password in passwords:
        assert re.fullmatch(r"[\w-]{43}", password)  # 256 bits, and nothing that needs quoting
    keys = read_keys(deployed / "secrets/keys/keys.json")
    (prometheus,) = [key for key in keys if key.name == "prometheus"]
    assert prometheus.roles == ("metrics",)
    assert prometheus.sha256 == hash_token(found["prometheus-key"].strip().encode())


def test_containers_can_read_them_and_nobody_else_here(deployed: Path) -> None:
    assert (deployed / "secrets").stat().st_mode & 0o777 == 0o700
    for file in (*secret_files().values(), "secrets/keys/keys.json", "secrets/keys"):
        mode = (deployed / file).stat().st_mode
        assert mode & 0o004 and not mode & 0o022, file


def test_what_is_there_stays_and_what_is_missing_is_made(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "secrets.sh", tmp_path)
    make_secrets(tmp_path)
    before = contents(tmp_path)
    said = make_secrets(tmp_path, "https://other.example/c", "https://other.example/w")
    assert contents(tmp_path) == before
    assert "made" not in said
    for name in ("alerts-critical", "alerts-warning"):
        assert f"kept secrets/{name}, which differs: remove it to change it\n" in said
    (tmp_path / "secrets/alerts-critical").unlink()
    assert "differs" not in make_secrets(tmp_path, "https://other.example/c")
    assert contents(tmp_path)["alerts-critical"] == "https://other.example/c\n"
    (tmp_path / "secrets/alerts-critical").write_text(before["alerts-critical"])
    (tmp_path / "secrets/prometheus-key").unlink()
    make_secrets(tmp_path)
    after = contents(tmp_path)
    assert after.pop("prometheus-key") != before.pop("prometheus-key")
    assert after == before
    assert len(read_keys(tmp_path / "secrets/keys/keys.json")) == 1  # the old one is no key now


def test_an_address_that_is_none_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "secrets.sh", tmp_path)
    for critical in ("", "alerts.example", "ftp://alerts.example"):
        with pytest.raises(subprocess.CalledProcessError) as refused:
            make_secrets(tmp_path, critical)
        assert refused.value.returncode == 2
    assert not (tmp_path / "secrets").exists()
