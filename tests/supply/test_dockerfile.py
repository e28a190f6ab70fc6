"""The Dockerfile, read by the builder's own parser: what it installs, from where, and as whom it
runs. Every rule is shown to refuse a Dockerfile that breaks it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable

import pytest
from dockerfile import GoParseError

from deploy.locks import renew
from tests.supply.dockerfile import ROOT, Dockerfile, context, parse, read

TARGETS = ("cpu", "cuda")
KNOWN = {
    *("ARG", "LABEL", "RUN", "ENV", "COPY", "WORKDIR", "VOLUME", "EXPOSE"),
    *("USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"),
}
LOCKED = {"--require-hashes", "--no-deps", "--only-binary=:all:"}
Rule = Callable[[Dockerfile], list[str]]


def bases_are_pinned(made: Dockerfile) -> list[str]:
    """A stage begins with an earlier one, or with an image of a full version."""
    exact = re.compile(r"[a-z/]+:\d+\.\d+\.\d+-[a-z]+(-[a-z]+)?(@sha256:[0-9a-f]{64})?")
    found = []
    for i, stage in enumerate(made.stages):
        earlier = [s.name for s in made.stages[:i]]
        if stage.base not in earlier and not exact.fullmatch(stage.base):
            found.append(f"{stage.name} begins with {stage.base}")
    return found


def only_what_is_locked_is_installed(made: Dockerfile) -> list[str]:
    """Every program that fetches is pip, from a lock file with hashes or from no index at all."""
    found = []
    for stage in made.stages:
        for step in stage.steps:
            if step.name != "RUN":
                continue
            for command in re.split(r"&&|;|\|", step.words[0]):
                words = command.split()
                fetches = re.match(r"\s*pip (--python \S+ )?(install|wheel|download)\b", command)
                fine = words[0] in {"pip", "python", "install"} and "-m pip" not in command
                if fetches and "--no-index" not in words:
                    lock = words[words.index("-r") + 1] if "-r" in words else ""
                    fine &= set(words) >= LOCKED
                    fine &= lock.startswith("deploy/locks/") and (ROOT / lock).is_file()
                    fine &= not any(re.search(r"://|^-i$|index-url", w) for w in words)
                if not fine:
                    found.append(command.strip())
    return found


def copies_come_from_the_context(made: Dockerfile) -> list[str]:
    """What is copied is let in by .dockerignore, or made by an earlier stage."""
    names, found = context(), []
    for i, stage in enumerate(made.stages):
        earlier = [s.name for s in made.stages[:i]]
        for step in stage.steps:
            if step.name != "COPY":
                continue
            if step.source is not None:
                found += [] if step.source in earlier else [f"--from={step.source}"]
                continue
            for source in step.words[:-1]:
                if not any(n == source or n.startswith(f"{source}/") for n in names):
                    found.append(source)
    return found


def instructions_are_known(made: Dockerfile) -> list[str]:
    """No ADD, which fetches; no ONBUILD, no STOPSIGNAL: the server stops at SIGTERM."""
    return [s.name for stage in made.stages for s in stage.steps if s.name not in KNOWN]


def runs_as_nobody(made: Dockerfile) -> list[str]:
    """A numeric user and group, neither of them root, named in the image itself."""
    users = {target: made.last(target, "USER").words[0] for target in TARGETS}
    return [f"{t}: {u}" for t, u in users.items() if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", u)]


def starts_without_a_shell(made: Dockerfile) -> list[str]:
    """Signals reach the server, and no shell reads what runs."""
    steps = ("ENTRYPOINT", "CMD", "HEALTHCHECK")
    return [f"{t} {s}" for t in TARGETS for s in steps if not made.last(t, s).json]


def environment_is_as_it_must(made: Dockerfile) -> list[str]:
    """BentoML restarts killed workers; the port is the one that is exposed; nothing is secret, and
    nothing is told to anybody."""
    found = []
    for target in TARGETS:
        given = made.environment(target)
        port = made.last(target, "EXPOSE").words[0]
        found += ["BENTOML_CONTAINERIZED"] if "BENTOML_CONTAINERIZED" in given else []
        found += [] if given["HEDGED_PORT"] == port else ["HEDGED_PORT"]
        silent = {"ORT_DISABLE_TELEMETRY": "1", "BENTOML_DO_NOT_TRACK": "True"}
        found += [k for k, v in silent.items() if given.get(k) != v]
        found += [] if given["HEDGED_DEVICE"] == target else ["HEDGED_DEVICE"]
        found += [k for k in given if re.search(r"KEY|TOKEN|SECRET|PASSWORD", k)]
        volume = made.last(target, "VOLUME").words[0]
        for name in ("HEDGED_DATA_DIR", "BENTOML_HOME"):
            if not given[name].startswith((volume, "/tmp/")):
                found.append(name)
    return found


def labels_say_what_it_is(made: Dockerfile) -> list[str]:
    """The OCI annotations, as pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    base = made.arguments["PYTHON_IMAGE"]
    wanted = {
        "title": project["name"],
        "version": project["version"],
        "licenses": project["license"],
        "revision": "${REVISION}",
        "base.name": "docker.io/library/${PYTHON_IMAGE}",
    }
    label = made.last("cpu", "LABEL").pairs
    given = {k.removeprefix("org.opencontainers.image."): v for k, v in label.items()}
    found = [k for k, v in wanted.items() if given.get(k) != v]
    found += [] if len(given.get("description", "")) > 20 else ["description"]
    return found + ([] if base.startswith("python:") else ["PYTHON_IMAGE"])


def nothing_that_installs_stays(made: Dockerfile) -> list[str]:
    """The final stages get their packages whole from another, and lose the base's own pip."""
    found = []
    for target in TARGETS:
        runs = [s.words[0] for s in made.chain(target) if s.name == "RUN"]
        if any(re.search(r"\b(apt|apt-get|pip3?) (install|wheel|download)\b", r) for r in runs):
            found.append(f"{target} installs")
        if not any(re.search(r"pip uninstall --yes .*\bpip\b", r) for r in runs):
            found.append(f"{target} keeps pip")
    return found


# Each rule, and an edit of the Dockerfile that it must refuse.
BROKEN: list[tuple[Rule, str, str]] = [
    (bases_are_pinned, "python:3.11.15-slim-trixie\n\nFROM", "python:3.11-slim\n\nFROM"),
    (bases_are_pinned, "FROM tools AS wheel", "FROM toolbox AS wheel"),
    (only_what_is_locked_is_installed, "--require-hashes ", ""),
    (only_what_is_locked_is_installed, "--no-index ", ""),
    (only_what_is_locked_is_installed, "--only-binary=:all:", ""),
    (only_what_is_locked_is_installed, "-r deploy/locks/build.txt", "setuptools"),
    (only_what_is_locked_is_installed, "-r deploy/locks/build.txt", "-r requirements.txt"),
    (
        only_what_is_locked_is_installed,
        "python -m venv",
        "apt-get install -y gcc && python -m venv",
    ),
    (copies_come_from_the_context, "COPY posthoc", "COPY tests"),
    (copies_come_from_the_context, "--from=installed-cpu", "--from=elsewhere"),
    (instructions_are_known, "COPY posthoc", "ADD posthoc"),
    (runs_as_nobody, "USER 10001:10001", "USER hedged"),
    (runs_as_nobody, "USER 10001:10001", "USER 0:10001"),
    (starts_without_a_shell, '["hedged", "serve"]', "hedged serve"),
    (environment_is_as_it_must, "PYTHONUNBUFFERED=1", "BENTOML_CONTAINERIZED=1"),
    (environment_is_as_it_must, "HEDGED_PORT=3000", "HEDGED_PORT=8080"),
    (environment_is_as_it_must, "ORT_DISABLE_TELEMETRY=1", "ORT_DISABLE_TELEMETRY=0"),
    (environment_is_as_it_must, "BENTOML_HOME=/tmp/bentoml", "BENTOML_HOME=/home/bentoml"),
    (labels_say_what_it_is, 'version="0.1.0"', 'version="0.0.9"'),
    (labels_say_what_it_is, "image.licenses", "image.license"),
    (nothing_that_installs_stays, "pip uninstall --yes", "pip list"),
    (nothing_that_installs_stays, "&& install -d", "&& apt-get install -y curl && install -d"),
]
RULES = sorted({rule for rule, _, _ in BROKEN}, key=lambda rule: rule.__name__)


@pytest.mark.parametrize("rule", RULES)
def test_the_dockerfile_keeps_the_rule(rule: Rule) -> None:
    assert rule(read()) == []


@pytest.mark.parametrize(("rule", "old", "new"), BROKEN)
def test_a_dockerfile_that_breaks_the_rule_is_refused(rule: Rule, old: str, new: str) -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    assert old in text
    assert rule(parse(text.replace(old, new))) != []


def test_a_text_that_is_no_dockerfile_is_none() -> None:
    with pytest.raises(GoParseError, match="ENV must have two arguments"):
        parse("FROM a\nENV b\n")


def test_there_are_two_targets_and_the_cpu_is_built_by_default() -> None:
    made = read()
    assert made.stages[-1].name == "cpu"
    for target in TARGETS:
        (copied,) = [s.source for s in made.chain(target) if s.name == "COPY"]
        assert copied == f"installed-{target}"
        (lock,) = [s.words[0] for s in made.chain(copied) if "serve-" in s.words[0]][:1]
        assert lock == f"deploy/locks/serve-{target}.txt"


def test_the_base_runs_the_python_that_was_locked_for() -> None:
    assert read().arguments["PYTHON_IMAGE"].startswith(f"python:{renew.PYTHON}.")


def test_the_context_is_the_four_floors_and_what_they_are_installed_with() -> None:
    names = context()
    floors = ("posthoc/", "calibration/", "service/", "hedged/")
    locks = {f"deploy/locks/{name}.txt" for name in renew.TITLES}
    others = {name for name in names if not name.startswith(floors)}
    assert others == {"pyproject.toml", "README.md", "LICENSE", *locks}
    assert not any("__pycache__" in name for name in names)
    assert {"service/page/index.html", "calibration/report.html", "hedged/cli.py"} <= {*names}
