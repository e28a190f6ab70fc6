"""The scheduled jobs of deploy/kubernetes/jobs/: what they run is what the command line takes."""

from __future__ import annotations

import os
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from hedged.cli import app
from service.scoring.engine import Engine

FOLDER = Path(__file__).parents[3] / "deploy" / "kubernetes" / "jobs"


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return found


def cron_pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"][
        "spec"
    ]
    return spec


def ray_pods() -> list[dict[str, Any]]:
    cluster = manifest("rayjob.yaml")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def parsed(words: list[str]) -> dict[str, Any]:
    """The arguments of `hedged score` as the real command line takes them."""
    assert words[:2] == ["hedged", "score"]
    group: Any = typer.main.get_command(app)
    with group.make_context("hedged", words[1:]) as context:
        command = group.get_command(context, "score")
        found: dict[str, Any] = command.make_context("score", words[2:], parent=context).params
    return found


def run(script: str, folder: Path, **env: str) -> list[str]:
    """The words that a script gives to `hedged`, by a program of that name that prints them."""
    program = folder / "hedged"
    program.write_text('#!/bin/sh\nprintf "%s\\n" hedged "$@"\n')
    program.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-ec", script],
        env={"PATH": path, **env},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def test_the_cron_job_scores_the_day_before_it_was_due(tmp_path: Path) -> None:
    container = cron_pod()["containers"][0]
    assert container["command"] == ["/bin/sh", "-ec"]
    (script,) = container["args"]
    due = datetime(2026, 3, 1, 2, 30, tzinfo=UTC)
    words = run(script, tmp_path, JOB_NAME=f"churn-scores-{int(due.timestamp()) // 60}")
    found = parsed(words)
    assert found["input"] == "s3://rows/day=2026-02-28?region=eu-west-1"
    assert found["output"] == "s3://scores/day=2026-02-28?region=eu-west-1"
    assert found["textfile"].suffix == ".prom" and found["passthrough"] == "customer"
    assert str(found["threads"]) == container["resources"]["requests"]["cpu"]
    again = parsed(run(script, tmp_path, JOB_NAME="by-hand", DAY="2025-12-31"))
    assert "day=2025-12-31" in again["input"] and "day=2025-12-31" in again["output"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/" + str(found[k]).split("/")[1] for k in ("bundle", "textfile")} <= mounts


def test_what_exits_75_is_started_again() -> None:
    spec = manifest("cronjob.yaml")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert cron_pod()["restartPolicy"] == "OnFailure"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] >= 3
    script = cron_pod()["containers"][0]["args"][0]
    assert "exec hedged" in script  # else the shell has the signal and hedged never hears of it


def test_the_ray_job_takes_the_engine_that_it_starts(tmp_path: Path) -> None:
    spec = manifest("rayjob.yaml")["spec"]
    (day,) = [e["value"] for e in ray_pods()[0]["containers"][0]["env"] if e["name"] == "DAY"]
    words = run(spec["entrypoint"], tmp_path, DAY=day)
    assert shlex.split(spec["entrypoint"])[:2] == words[:2]
    found = parsed(words)
    Engine(found["engine"], found["device"], found["threads"], found["workers"])
    assert found["engine"] == "ray" and f"day={day}" in found["input"]
    worker = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    cores = int(ray_pods()[1]["containers"][0]["resources"]["limits"]["cpu"])
    assert found["workers"] * found["threads"] <= worker["maxReplicas"] * cores
    images = {pod["containers"][0]["image"] for pod in ray_pods()}
    assert len(images) == 1  # the same software everywhere


@pytest.mark.parametrize("pod", [cron_pod(), *ray_pods()], ids=["cron", "head", "worker"])
def test_pods_have_few_rights_and_no_secret_in_the_open(pod: dict[str, Any]) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    for container in pod["containers"]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert container["envFrom"] == [{"secretRef": {"name": "scoring-s3"}}]
        assert {e["name"] for e in container["env"]} <= {"JOB_NAME", "DAY"}
        assert "memory" in container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    cron = cron_pod()["containers"][0]["securityContext"]
    assert cron["readOnlyRootFilesystem"] is True
