"""The check of a built image; where there is an engine, on real containers.

With an engine and the image: ``CONTAINER_ENGINE=docker pytest -m container tests/deploy``;
CONTAINER_OPTIONS are more options of its ``create``.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from deploy.check_image import GRACE_S, OPTIONS, CheckError, check
from tests.deploy.composed import read_compose, seconds
from tests.supply.dockerfile import ROOT

SCRIPT = str(ROOT / "deploy/check_image.py")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The script as a process."""
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_an_engine_that_is_not_there_is_named(classification_bundle: Path) -> None:
    done = run("hedged", classification_bundle, "--engine", "nothing-runs-containers --debug")
    assert done.returncode == 1
    assert "there is no nothing-runs-containers here" in done.stderr


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    done = run("hedged", tmp_path, "--engine", sys.executable)
    assert done.returncode == 1
    assert f"{tmp_path} is no bundle; `make demo` makes demo/bundle" in done.stderr


def test_what_the_engine_says_is_told(classification_bundle: Path) -> None:
    done = run("hedged", classification_bundle, "--engine", f"{sys.executable} -c 'exit(\"no\")'")
    assert done.returncode == 1
    assert "create --read-only" in done.stderr and "failed: no" in done.stderr


def test_it_runs_as_compose_does() -> None:
    service = read_compose()["services"]["hedged"]
    assert service["read_only"] and "--read-only" in OPTIONS
    assert seconds(service["stop_grace_period"]) == GRACE_S
    for option, values in (
        ("--cap-drop", service["cap_drop"]),
        ("--tmpfs", service["tmpfs"]),
        ("--security-opt", [v.removesuffix(":true") for v in service["security_opt"]]),
    ):
        assert values == [value for name, value in pairwise(OPTIONS) if name == option]


@pytest.mark.container
def test_the_image_is_right_and_a_wrong_one_is_noticed(classification_bundle: Path) -> None:
    engine = shlex.split(os.environ["CONTAINER_ENGINE"])
    more = shlex.split(os.environ.get("CONTAINER_OPTIONS", ""))
    assert len(check(engine, "hedged", classification_bundle, more)) == 5
    for wrong, says in (
        (["--user", "0", "--tmpfs", "/data"], "within: .*'user': 0"),
        (["--env", "HEDGED_OPEN=false"], "the container ended"),
    ):
        with pytest.raises(CheckError, match=says):
            check(engine, "hedged", classification_bundle, [*more, *wrong])
