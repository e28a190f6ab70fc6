"""SECURITY.md: every promise names a test that exists, and its commands run."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from hedged.cli import app
from tests.supply.dockerfile import ROOT

TEXT = (ROOT / "SECURITY.md").read_text("utf-8")
PROMISES = re.findall(r"^\| (?!promise |---)(.+?) \| (.+) \|$", TEXT, re.M)


def missing(node: str) -> str | None:
    """Why a test is not there, or None."""
    file, _, name = node.partition("::")
    if not (ROOT / file).is_file():
        return f"{file} does not exist"
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    known = {
        n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return None if name in known and name.startswith("test_") else f"{file} has no {name}"


@pytest.mark.parametrize(("promise", "held_by"), PROMISES, ids=[p for p, _ in PROMISES])
def test_every_promise_is_held_by_tests_that_exist(promise: str, held_by: str) -> None:
    nodes = re.findall(r"`(.+?)`", held_by)
    assert nodes and " ".join(f"`{node}`" for node in nodes) == held_by, promise
    assert [why for node in nodes if (why := missing(node))] == []


def test_a_test_that_does_not_exist_is_found() -> None:
    assert len(PROMISES) > 20
    assert missing("tests/supply/test_security.py::test_nothing") is not None
    assert missing("tests/supply/test_nothing.py::test_nothing") is not None
    assert missing("tests/supply/test_security.py::missing") is not None


def blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", TEXT, re.S)


def test_signing_goes_as_it_is_written(classification_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(classification_bundle, tmp_path / "bundle")
    (block,) = [b for b in blocks() if "hedged sign" in b]
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "hedged").write_text(f'#!/bin/sh\nexec {sys.executable} -m hedged "$@"\n')
    (commands / "hedged").chmod(0o755)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("HEDGED_")}
    environ |= {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "the signature holds" in done.stdout
    assert (tmp_path / "bundle.sig").is_file()


def test_other_commands_are_there() -> None:
    (block,) = [b for b in blocks() if "renew.py" in b]
    for line in block.splitlines():
        program, script, *words = line.split()
        assert program == "python"
        done = subprocess.run(
            [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0
        assert [w for w in words if w.startswith("-") and w not in done.stdout] == []
    group = typer.main.get_command(app)
    for command, rest in re.findall(r"`hedged ([a-z]+)([^`]*)`", TEXT):
        params = group.commands[command].params  # type: ignore[attr-defined]
        flags = {o for p in params for o in p.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= flags, (command, rest)


def test_variables_are_settings_of_the_service() -> None:
    from service.settings import Settings

    named = set(re.findall(r"HEDGED_([A-Z_]+)", TEXT))
    assert named and {n.lower() for n in named} <= set(Settings.model_fields)
