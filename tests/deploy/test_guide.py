"""docs/guides/deploy.md: its commands run as they stand, and what it lists is what there is.

hedged, the shell, kubectl (as far as it goes without a cluster), pg_dump and pg_restore are real.
docker and curl are not: a program of that name writes down what it was asked, which is then held
against deploy/compose.yaml and the routes; what is run in the container of PostgreSQL is run here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import pytest
import sqlalchemy as sa
import yaml

from calibration.bundle import load_bundle
from calibration.predictor import Predictor
from service.access import ROUTE_ROLES
from service.bundles import live_version
from service.keys import read_keys
from service.labels import LabelItem
from service.ledger import Ledger
from service.schema import ledger_url, make_engine
from tests.calibration.renewals import truth
from tests.deploy.clustered import SECRETS, faults
from tests.deploy.composed import DEPLOY, read_compose
from tests.deploy.kustomized import pods, read, variables
from tests.factory import rows, version_of
from tests.supply.dockerfile import ROOT
from tests.supply.dockerfile import read as read_dockerfile

GUIDE = ROOT / "docs/guides/deploy.md"


def blocks(test: str) -> list[str]:
    """The guide's blocks that a test of this file runs."""
    mark = f"<!-- test: elsewhere tests/deploy/test_guide.py::{test} -->"
    return re.findall(rf"{mark}\n```bash\n(.*?)```", GUIDE.read_text(), re.S)


# Writes its words to CALLS, a line of JSON each; runs what is meant for PostgreSQL's container.
RECORDER = """
import json, os, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([name, *words]), file=calls)
if "exec" in words and "postgres" in words:
    command = words[words.index("postgres") + 1 :]
    os.execv(f"{os.environ['PGBIN']}/{command[0]}", command)
"""
# The real kubectl where it needs no cluster.
KUBECTL = """
import json, os, subprocess, sys
words, real = sys.argv[1:], os.environ["KUBECTL"]
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps(["kubectl", *words]), file=calls)
if words[:2] == ["create", "secret"]:
    made = subprocess.run(
        [real, *words, "--dry-run=client", "--output=json"], check=True, stdout=subprocess.PIPE
    )
    with open(os.environ["SECRETS"], "a") as out:
        print(json.dumps(json.loads(made.stdout)), file=out)
elif words[:2] == ["apply", "-k"]:
    subprocess.run([real, "kustomize", words[2]], check=True, stdout=subprocess.DEVNULL)
"""


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!{sys.executable}\n{text}")
    (folder / name).chmod(0o755)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Reader:
    """Somebody with a bundle, the repository's deploy/ and a PostgreSQL, who types the blocks."""

    def __init__(self, folder: Path, postgres: Any, kubectl: Path, bundle: Path) -> None:
        self.folder = folder
        unmade = shutil.ignore_patterns("secrets", ".env")
        shutil.copytree(DEPLOY, folder / "deploy", ignore=unmade)
        for name, version in (("bundle", "1"), ("renewed", "2")):
            made = version_of(bundle, folder / "made", "machines", version)
            made.rename(folder / name)
        programs = folder / "programs"
        programs.mkdir()
        for name in ("docker", "curl"):
            program(programs, name, RECORDER)
        program(programs, "kubectl", KUBECTL)
        self.socket = parse_qs(urlsplit(postgres.get_uri()).query)["host"][0]
        self.calls, self.secrets = folder / "calls", folder / "made-secrets"
        self.environment = {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "SECRETS": str(self.secrets),
            "KUBECTL": str(kubectl),
            "PGBIN": str(postgres.bin_path),
            "PGHOST": self.socket,
        }

    def types(self, block: str, code: int = 0) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def live(self) -> str:
        return live_version(self.folder / "models/machines")


@pytest.fixture
def ledger_database(postgres: Any) -> Any:
    """The database of the containers, with the tables of a ledger and a row in one of them."""
    postgres.psql("DROP DATABASE IF EXISTS hedged WITH (FORCE)")
    postgres.psql("DROP ROLE IF EXISTS hedged")
    postgres.psql("CREATE USER hedged")
    postgres.psql("CREATE DATABASE hedged OWNER hedged")
    return postgres


def test_every_command_runs(
    classification_bundle: Path, ledger_database: Any, kubectl: Path, tmp_path: Path
) -> None:
    reader = Reader(tmp_path, ledger_database, kubectl, classification_bundle)
    url = f"postgresql://hedged@/hedged?host={reader.socket}"
    Ledger.open(url, spool_dir=tmp_path / "spool").close()
    engine = make_engine(ledger_url(url))

    def ask(statement: str) -> Any:
        with engine.begin() as connection:
            found = connection.execute(sa.text(statement))
            return found.scalar() if found.returns_rows else None

    ask("INSERT INTO bundles (identity, model, version, task) VALUES ('i', 'm', '1', 'x')")

    def bundles() -> int:
        return int(ask("SELECT count(*) FROM bundles"))

    # What must be so after the block that has these words.
    after: dict[str, Callable[[], object]] = {
        "cp -r bundle ": lambda: reader.live() == "1",
        "deploy/secrets.sh": lambda: {k.name for k in read_keys(keys)} == {"prometheus", "web"},
        "cp -r renewed ": lambda: reader.live() == "1",
        "BUNDLES=": lambda: environment_file(tmp_path) == {"BUNDLES": f"{tmp_path}/models"},
        "pg_dump ": lambda: (tmp_path / "ledger.dump").stat().st_size > 0 and lose_everything(),
        "pg_restore ": lambda: bundles() == 1,
    }
    keys = tmp_path / "deploy/secrets/keys/keys.json"

    def lose_everything() -> bool:
        ask("DELETE FROM bundles")
        return bundles() == 0

    there = {path.name for path in tmp_path.iterdir()}
    for block in blocks("test_every_command_runs"):
        reader.types(block)
        for words in [w for w in after if w in block]:
            assert after.pop(words)(), words
    assert not after
    for name, *words in lines(reader.calls):
        {"docker": check_docker, "curl": check_curl, "kubectl": check_kubectl}[name](words)
    check_secrets(lines(reader.secrets))
    engine.dispose()
    made = {path.name for path in tmp_path.iterdir()} - there
    made -= {reader.calls.name, reader.secrets.name}
    assert {"models", "web.key", "keys.json", "key", "pg_service.conf", "ledger.dump"} <= made
    for name in (*made, "bundle", "renewed", "deploy/.env", "deploy/secrets/grafana-password"):
        assert ignored(tmp_path, name), name
    assert not ignored(tmp_path, "deploy/compose.yaml")


def environment_file(folder: Path) -> dict[str, str]:
    """What Compose reads beside its file, which must be what that file asks for."""
    found = dict(line.split("=", 1) for line in (folder / "deploy/.env").read_text().splitlines())
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    assert found.keys() == asked
    return found


def ignored(folder: Path, name: str) -> bool:
    """Whether git leaves that file of a reader's clone alone."""
    if not (folder / ".git").exists():
        subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True, timeout=60)
        shutil.copy(ROOT / ".gitignore", folder)
    asked = ["git", "check-ignore", "--quiet", name]
    return subprocess.run(asked, cwd=folder, timeout=60).returncode == 0


def labelled_predictions(url: str, spool: Path, bundle: Path) -> None:
    """3,000 predictions in a ledger, whose truth is more spread than the bundle believes."""
    predictor, ledger = Predictor(bundle), Ledger.open(url, spool_dir=spool)
    m, identity = predictor.manifest, predictor.bundle.identity
    x, _ = rows("classification", 3000, 40)
    ledger.register(m.name, m.version, identity, task=m.task, width=3, classes=m.classes)
    ids = [f"r{i}" for i in range(len(x))]
    ledger.record(m.name, m.version, identity, ids, predictor.run({"x": x}), "0.9")
    y = truth("classification", x, 5.0, 41)
    ledger.add_labels([LabelItem(m.name, i, c) for i, c in zip(ids, y.tolist(), strict=True)])
    ledger.close()


def test_a_bundle_is_renewed_on_the_deployed_ledger(
    classification_bundle: Path, ledger_database: Any, kubectl: Path, tmp_path: Path
) -> None:
    reader = Reader(tmp_path, ledger_database, kubectl, classification_bundle)
    shutil.rmtree(tmp_path / "renewed")  # the command makes it
    shutil.copytree(tmp_path / "bundle", tmp_path / "models/machines/1")
    (tmp_path / "deploy/secrets").mkdir()
    (tmp_path / "deploy/secrets/postgres-password").write_text("unasked")
    url = f"postgresql://hedged@/hedged?host={reader.socket}"
    (block,) = blocks("test_a_bundle_is_renewed_on_the_deployed_ledger")
    # Of the address nothing is left where docker prints none, and then PGHOST says where.
    Ledger.open(url, spool_dir=tmp_path / "spool").close()
    assert "the ledger has no predictions of machines 1" in reader.types(block, code=1)
    labelled_predictions(url, tmp_path / "spool", tmp_path / "bundle")
    assert "3,000 of 3,000 predictions have a label" in reader.types(block)
    assert load_bundle(tmp_path / "renewed").manifest.version == "2"
    (ps, inspect) = lines(reader.calls)[-2:]
    assert ps == ["docker", "compose", "-f", "deploy/compose.yaml", "ps", "--quiet", "postgres"]
    compose = read_compose()
    (network,) = compose["services"]["postgres"]["networks"]
    assert f".Networks.{compose['name']}_{network}.IPAddress" in inspect[3]
    (ledger,) = re.findall(r'--ledger "(.*?)"', block)
    stored = compose["services"]["postgres"]["environment"]
    assert ledger == f"postgresql://{stored['POSTGRES_USER']}@$host/{stored['POSTGRES_DB']}"


def check_docker(words: list[str]) -> None:
    """A call of docker: a command of Compose on our file and its services, or of an image."""
    if words[0] != "compose":
        assert words[0] in {"build", "push"} and "registry.example/hedged:" in " ".join(words)
        if "--target" in words:
            assert words[words.index("--target") + 1] in read_dockerfile().names
        return
    assert words[1:3] == ["-f", "deploy/compose.yaml"]
    command, *rest = words[3:]
    flags = {"up": {"--build", "--detach", "--wait"}, "exec": {"--no-TTY"}, "stop": set[str]()}
    plain = [w for w in rest if not w.startswith("--")]
    if command == "exec":
        plain = plain[:1]
        rest = rest[: rest.index(plain[0])]
    assert {w for w in rest if w.startswith("--")} <= flags[command], words
    assert set(plain) <= read_compose()["services"].keys(), words


def check_curl(words: list[str]) -> None:
    url = urlsplit(words[-1])
    assert url.hostname == "127.0.0.1" and url.path in ROUTE_ROLES
    (published,) = read_compose()["services"]["hedged"]["ports"]
    assert published.startswith(f"127.0.0.1:{url.port}:")
    (header,) = [w for w in words if w.startswith("Authorization: Bearer ")]
    assert header.startswith("Authorization: Bearer hedged_")


def check_kubectl(words: list[str]) -> None:
    """A call of kubectl: a secret or an overlay that the real one took, a file that is valid, or
    something done to an object that is there."""
    shelf = read("shelf.yaml")[0]["metadata"]["name"]
    at = words.index("--namespace") if "--namespace" in words else len(words)
    assert words[at + 1 : at + 2] in ([], ["hedged"])
    match [w for w in (*words[:at], *words[at + 2 :]) if not w.startswith("--")]:
        case ["create", "secret", "generic", _] | ["apply", "-k", _]:
            pass
        case ["apply", "-f", name]:
            for found in yaml.safe_load_all((ROOT / name).read_text()):
                if found["kind"] != "InferenceService":  # test_custom_resources.py
                    kubernetes_validate.validate(found, "1.30", strict=True)
        case ["wait", name]:
            assert name == f"pod/{shelf}"
        case ["cp", source, target]:
            assert target == f"{shelf}:/bundles/{Path(source).relative_to('models')}"
        case ["exec", name, "hedged", "activate", root, "machines", "1" | "2"]:
            assert (name, root) == (shelf, "/bundles")
        case ["port-forward", name, ports]:
            (service,) = (o for o in read("base/service.yaml") if o["kind"] == "Service")
            assert name == f"service/{service['metadata']['name']}"
            assert ports == f"3000:{service['spec']['ports'][0]['port']}"
        case ["rollout", "status", name]:
            assert name == "deployment/hedged"
        case other:
            pytest.fail(f"{other} is not known")


def check_secrets(made: list[dict[str, Any]]) -> None:
    """Those that the commands make are those that pods mount and Prometheus reads."""
    assert {s["metadata"]["name"] for s in made} == SECRETS - {"bundles-bucket"}
    assert {s["metadata"]["namespace"] for s in made} == {"hedged"}
    held = {s["metadata"]["name"]: set(s["data"]) for s in made}
    used = set()
    for _, _, spec in pods([*read("base/service.yaml"), *read("base/monitor.yaml")]):
        (container,) = spec["containers"]
        at = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
        for volume in spec["volumes"]:
            if name := volume.get("secret", {}).get("secretName"):
                (file,) = held[name]
                assert f"{at[volume['name']]}/{file}" in variables(container).values()
                used.add(name)
    scraped = read("monitoring/servicemonitor.yaml")[0]["spec"]["endpoints"][0]["authorization"]
    assert held[scraped["credentials"]["name"]] == {scraped["credentials"]["key"]}
    assert held.keys() == used | {scraped["credentials"]["name"]}


def test_the_pod_for_bundles_is_one_of_kubernetes() -> None:
    shelf = read("shelf.yaml")
    kubernetes_validate.validate(shelf[0], "1.30", strict=True)
    assert faults(shelf) == []


def test_every_alert_is_listed_with_its_severity() -> None:
    listed = dict(re.findall(r"^\| `(UQ\w+)` \| (\w+) \|", GUIDE.read_text(), re.M))
    groups = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert listed == {rule["alert"]: rule["labels"]["severity"] for rule in rules}
    assert all("runbook" in rule["annotations"] for rule in rules)


def test_what_is_published_is_listed() -> None:
    listed = set(re.findall(r"<http://(127\.0\.0\.1:\d+)>", GUIDE.read_text()))
    services = read_compose()["services"].values()
    published = {port.rpartition(":")[0] for s in services for port in s.get("ports", [])}
    assert listed == published


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (check_docker, "compose -f deploy/compose.yaml stop hedge"),
        (check_docker, "compose -f deploy/compose.yaml up --detached"),
        (check_docker, "compose -f deploy/compose.yml up --detach"),
        (check_docker, "build --target gpu --tag registry.example/hedged:0.1.0-cuda ."),
        (check_curl, "-H 'Authorization: Bearer hedged_x' http://127.0.0.1:3001/v2"),
        (check_curl, "-H 'Authorization: Bearer ' http://127.0.0.1:3000/v2"),
        (check_kubectl, "rollout status --namespace hedged deployment/hedge"),
        (check_kubectl, "rollout status --namespace default deployment/hedged"),
        (check_kubectl, "cp --namespace hedged models shelf:/models"),
        (check_kubectl, "cp --namespace hedged models/machines/2 shelf:/bundles/machines"),
        (check_kubectl, "port-forward --namespace hedged service/hedged 3000:3000"),
    ],
)
def test_a_wrong_call_is_found(check: Callable[[list[str]], None], words: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(shlex.split(words))
