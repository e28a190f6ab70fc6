"""CHANGELOG.md, CITATION.cff, the hooks before a commit and the development container, each against
the tool that reads it and against the project."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from hedged.cli import app
from service.settings import Settings
from tests.supply.dockerfile import ROOT, read

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def faults(text: str) -> list[str]:
    """What is not as Keep a Changelog wants it."""
    found = [] if text.startswith("# Changelog\n") else ["no title"]
    parts = re.split(r"^## (.*)\n", text, flags=re.M)[1:]
    heads = list(zip(parts[::2], parts[1::2], strict=True))
    dates = []
    for head, body in heads:
        dated = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", head)
        if dated:
            dates.append(datetime.date.fromisoformat(dated[2]))
        elif head != "[Unreleased]":
            found.append(f"heading {head!r}")
        kinds = re.findall(r"^### (.*)$", body, re.M)
        found += [f"kind {kind!r}" for kind in kinds if kind not in KINDS]
        for section in re.split(r"^### .*\n", body, flags=re.M)[1:]:
            found += [] if re.search(r"^- \S", section, re.M) else ["an empty section"]
    found += [] if dates == sorted(dates, reverse=True) else ["not the newest first"]
    return found + ([] if dates else ["no release"])


def test_the_changelog_is_one_and_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert faults(text) == []
    newest = re.search(r"^## \[(\d\S*)\]", text, re.M)
    assert newest is not None and newest[1] == PROJECT["version"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# Changelog", "# News"),
        ("## [0.1.0] - ", "## 0.1.0, "),
        ("### Added", "### New"),
        ("### Added", "### Fixed\n\n### Added"),
        ("2026-11-29", "2026-1-29"),
        ("## [0.1.0]", "## [0.0.1] - 2020-01-01\n\n- x\n\n## [0.1.0]"),
    ],
)
def test_a_changelog_that_is_none_is_refused(old: str, new: str) -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert old in text and faults(text.replace(old, new)) != []


def test_what_the_changelog_names_exists() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    commands = {c.name for c in app.registered_commands}
    assert set(re.findall(r"`hedged ([a-z]+)", text)) <= commands
    settings = {f"HEDGED_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"HEDGED_[A-Z_]+", text)) <= settings


def citation(path: Path) -> subprocess.CompletedProcess[str]:
    """The check of the Citation File Format's own schema."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema", path),
            *("--builtin-schema", "vendor.citation-file-format"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_citation_is_one_and_says_what_the_project_says(tmp_path: Path) -> None:
    path = ROOT / "CITATION.cff"
    done = citation(path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = yaml.safe_load(path.read_text("utf-8"))
    assert record["title"].lower() == PROJECT["name"]
    assert record["version"] == PROJECT["version"]
    assert record["license"] == PROJECT["license"]
    assert record["abstract"] == PROJECT["description"]
    released = re.search(r"^## \[.*\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert released is not None and record["date-released"] == released[1]
    for field in ("title", "authors", "message"):
        broken = tmp_path / f"{field}.cff"
        broken.write_text(yaml.safe_dump({k: v for k, v in record.items() if k != field}))
        assert citation(broken).returncode != 0


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the hooks, the programs that they run, and the house in small."""
    root = tmp_path / "repository"
    for floor in ("posthoc", "calibration", "service", "hedged", "bench"):
        (root / floor).mkdir(parents=True)
        (root / floor / "__init__.py").write_text('"""A floor."""\n')
    (root / "tests").mkdir()
    shutil.copy(ROOT / "tests/check_imports.py", root / "tests")
    for name in ("pyproject.toml", ".pre-commit-config.yaml"):
        shutil.copy(ROOT / name, root)
    (root / ".venv").symlink_to(sys.prefix)
    (root / ".gitignore").write_text(".venv\n.mypy_cache/\n.ruff_cache/\n")
    git(root, "init", "--quiet")
    return root


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=root, env=environment(root), check=True)


def environment(root: Path) -> dict[str, str]:
    """No hook may fetch: whatever asks the network finds a proxy that nobody is."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "HEDGED_"))}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    return outside | proxies | {"PRE_COMMIT_HOME": str(root.parent / "home"), "HOME": str(root)}


def hooks(root: Path) -> tuple[int, dict[str, str]]:
    """What each hook says of all files."""
    git(root, "add", "--all")
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "run", "--all-files", "--color", "never"],
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "[WARNING]" not in done.stderr + done.stdout
    found = dict(re.findall(r"^(\S.*?)\.{3,}(?:\(.*\))?(\w+)$", done.stdout, re.M))
    assert len(found) == 4, done.stdout + done.stderr
    return done.returncode, found


def test_the_hooks_pass_what_is_fine_and_stop_what_is_not(repository: Path) -> None:
    code, found = hooks(repository)
    assert (code, set(found.values())) == (0, {"Passed"})
    (repository / "posthoc/bad.py").write_text(
        "import os\nimport calibration\n\n\ndef f(x:int) -> str:\n    return x\n"
    )
    code, found = hooks(repository)
    assert (code, set(found.values())) == (1, {"Failed"})


def test_the_hooks_are_what_lint_runs() -> None:
    record = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert [repo["repo"] for repo in record["repos"]] == ["local"]
    entries = [hook["entry"].split()[:2] for hook in record["repos"][0]["hooks"]]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.M)
    assert recipe is not None
    plain = recipe[1].replace("$(PY)", ".venv/bin/python").replace("$(VENV)", ".venv")
    assert entries == [line.split()[:2] for line in plain.splitlines()]


def test_the_development_container_is_made_by_make() -> None:
    record = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text("utf-8"))
    base = read().arguments["PYTHON_IMAGE"]
    assert record["image"] == base.replace("-slim-", "-")  # with make and git, the same Python
    assert record["forwardPorts"] == [Settings.model_fields["port"].default]
    program, *targets = record["postCreateCommand"].split()
    assert program == "make" and targets
    for words, works in ((targets, True), (["no-such-target"], False)):
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, timeout=60)
        assert (done.returncode == 0) is works


def test_the_advice_on_laplace_torch_is_what_make_installs() -> None:
    made = re.search(r"^ORACLE := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert made is not None
    source = (ROOT / "posthoc/laplace_torch.py").read_text()
    told = re.search(r'pip install --no-deps (.*?); pip "\n', source, re.S)
    assert told is not None
    assert set(re.findall(r"[\w-]+==[\w.]+", told[1])) == set(made[1].split())
