"""The Dockerfile as stages of instructions, read by the parser of Docker's own builder."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path

import dockerfile

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its name in capitals, flags, words, and whether they were a JSON list."""

    name: str
    words: tuple[str, ...]
    flags: tuple[str, ...] = ()
    json: bool = False

    @property
    def pairs(self) -> dict[str, str]:
        """The keys and values of ENV and LABEL."""
        values = [word.strip('"') for word in self.words[1::2]]
        return dict(zip(self.words[::2], values, strict=True))

    @property
    def source(self) -> str | None:
        """The stage that COPY takes from."""
        found = [f.removeprefix("--from=") for f in self.flags if f.startswith("--from=")]
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: what it begins with, and its instructions."""

    name: str
    base: str
    steps: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """Arguments before the first stage, and the stages in their order."""

    arguments: dict[str, str]
    stages: tuple[Stage, ...]

    def chain(self, name: str) -> list[Instruction]:
        """All instructions of a stage: those of the stages that it begins with come first."""
        (stage,) = [s for s in self.stages if s.name == name]
        before = self.chain(stage.base) if stage.base in self.names else []
        return [*before, *stage.steps]

    @property
    def names(self) -> list[str]:
        """The names of all stages."""
        return [stage.name for stage in self.stages]

    def environment(self, name: str) -> dict[str, str]:
        """What ENV says in a stage, all in all."""
        found: dict[str, str] = {}
        for step in self.chain(name):
            if step.name == "ENV":
                found |= step.pairs
        return found

    def last(self, stage: str, name: str) -> Instruction:
        """The instruction of that name that counts."""
        return [step for step in self.chain(stage) if step.name == name][-1]


def parse(text: str) -> Dockerfile:
    """The stages of a Dockerfile. Raises the builder's own error where it is none."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for command in dockerfile.parse_string(text):
        step = Instruction(command.cmd.upper(), command.value, command.flags, command.json)
        if step.name == "ARG" and not stages:
            key, _, value = step.words[0].partition("=")
            arguments[key] = value
        elif step.name == "FROM":
            base = step.words[0]
            for key, value in arguments.items():
                base = base.replace("${" + key + "}", value)
            name = step.words[-1].split()[-1] if len(step.words) > 1 else ""
            stages.append(Stage(name, base, ()))
        else:
            last = stages.pop()
            stages.append(Stage(last.name, last.base, (*last.steps, step)))
    return Dockerfile(arguments, tuple(stages))


def read() -> Dockerfile:
    """The project's own."""
    return parse((ROOT / "Dockerfile").read_text("utf-8"))


def context(root: Path = ROOT) -> list[str]:
    """The files that .dockerignore lets into the build, by the rule that the last pattern counts.

    It knows the patterns that ours has: a path, ``*`` within one name, and ``**/name``.
    """
    patterns = [
        line
        for line in (root / ".dockerignore").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    found: list[str] = []
    for path in sorted(p for p in root.glob("*") if p.name not in {".git", ".venv"}):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        names = [p.relative_to(root).as_posix() for p in files]
        found += [name for name in names if not _left_out(name, patterns)]
    return found


def _left_out(name: str, patterns: list[str]) -> bool:
    out = False
    for pattern in patterns:
        if _covers(pattern.removeprefix("!"), name):
            out = not pattern.startswith("!")
    return out


def _covers(pattern: str, name: str) -> bool:
    """Whether a pattern names the file or one of the folders above it."""
    parts = name.split("/")
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    if pattern.startswith("**/"):
        return any(fnmatch.fnmatchcase(part, pattern[3:]) for part in parts)
    expression = re.compile(re.escape(pattern).replace(r"\*", "[^/]*"))
    return any(expression.fullmatch(path) for path in above)
