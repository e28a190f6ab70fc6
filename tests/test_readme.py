"""Every command of README and guides runs, in order, as a reader would; outputs shown are compared.

A fenced block of commands has an HTML comment above it that says how it is tested:

* ``test: walk`` runs here, in bash or Python, in one folder after the other blocks;
* ``test: serve`` runs in the background from there on;
* ``test: file NAME`` is written to that file;
* ``test: output`` is what the block above prints, numbers within 2 %, ``…`` for what is left out;
* ``test: long`` is part of what the command named prints; checked by ``make test-long``;
* ``test: names`` names only targets of the Makefile, commands of hedged, and benchmarks;
* ``test: elsewhere NODE`` is what the test of that name runs;
* ``test: dockerfile`` fits the Dockerfile.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.documentation import COMMANDS, PAGES, ROOT
from tests.ports import held_port

FENCE = re.compile(r"(?:<!-- test: ([^\n]*?) -->\n)?```(\w+)\n(.*?)```", re.S)
RUNNABLE = ("bash", "python")
NUMBER = r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
HEX = r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{12,}\b"
TOKEN = re.compile(f"(?P<hex>{HEX})|(?P<number>{NUMBER})|…|\\s+")
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, how it is tested, and the line it begins on."""

    language: str
    text: str
    kind: str
    argument: str
    line: int
    page: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for m in FENCE.finditer(text):
        kind, _, argument = (m[1] or "").partition(" ")
        line = text.count("\n", 0, m.start()) + 1
        found.append(Block(m[2], m[3], kind, argument, line, page.relative_to(ROOT).as_posix()))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(kind: str) -> list[Block]:
    return [b for b in BLOCKS if b.kind == kind]


def pattern(line: str) -> re.Pattern[str]:
    """A regular expression for a line like that one, numbers as groups."""
    out, at = "", 0
    for m in TOKEN.finditer(line):
        out += re.escape(line[at : m.start()])
        at = m.end()
        if m["hex"]:
            out += "[0-9a-f]+"
        elif m["number"]:
            out += f"({NUMBER})"
        else:
            out += ".*" if m[0] == "…" else r"\s+"
    return re.compile(out + re.escape(line[at:]))


def numbers(line: str) -> list[float]:
    return [float(m["number"].replace(",", "")) for m in TOKEN.finditer(line) if m["number"]]


def missing(shown: str, printed: str) -> str | None:
    """The first shown line that is not printed after the one before it; None: all are."""
    lines = [line.strip() for line in printed.splitlines()]
    at = 0
    for want in filter(None, (line.strip() for line in shown.splitlines())):
        if want == "…":
            continue
        like = pattern(want)
        while at < len(lines):
            got = like.fullmatch(lines[at])
            at += 1
            if got and close(numbers(want), [float(g.replace(",", "")) for g in got.groups()]):
                break
        else:
            return want
    return None


def close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(
        abs(x - y) <= 0.02 * max(1.0, abs(x)) for x, y in zip(a, b, strict=True)
    )


def test_outputs_are_compared_as_they_should_be() -> None:
    shown = "rows: a 1,239, b 0.4106\n…\nidentity 4af503c86f45c76e"
    assert missing(shown, "x\nrows: a 1,240, b 0.4150\nz\nidentity 00f503c86f45c7aa\n") is None
    assert missing(shown, "rows: a 1,239, b 0.5106\nidentity 4af503c86f45c76e") is not None
    assert missing(shown, "rows: a 1,239, b 0.4106\n") == "identity 4af503c86f45c76e"
    assert missing("a\nb", "b\na") == "b"
    assert missing("… rows/s → scored", "7,861 rows/s → scored") is None


def test_every_block_of_commands_says_how_it_is_tested() -> None:
    known = {"walk", "serve", "names", "elsewhere", "dockerfile"}
    for block in BLOCKS:
        assert block.language not in RUNNABLE or block.kind in known, block
        assert block.kind in known | {"", "file", "output", "long"}, block
    assert len(of("walk")) >= 8 and len(of("serve")) == 1


class Reader:
    """Somebody who types what the pages say, from a fresh clone in ``root``."""

    def __init__(self, root: Path, port: int):
        self.cwd = root
        for name in ("docs", "deploy"):
            (root / name).symlink_to(ROOT / name)
        (root / ".venv").symlink_to(sys.prefix)
        self.port = port
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("HEDGED_")} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HEDGED_PORT": str(self.port),
            "XDG_CACHE_HOME": str(root / "home-cache"),
            "COLUMNS": "110",
        }
        self.server: subprocess.Popen[bytes] | None = None

    def run(self, block: Block) -> str:
        """What a block prints; it must succeed, and the next one starts in its last folder."""
        if block.language == "python":
            command = [sys.executable, "-c", block.text]
        else:
            text = block.text.replace("127.0.0.1:3000", f"127.0.0.1:{self.port}")
            command = ["bash", "-e", "-c", f"{text}\npwd > {self._state}"]
        done = subprocess.run(
            command, cwd=self.cwd, env=self.environ, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        if block.language != "python":
            self.cwd = Path(self._state.read_text().strip())
        return done.stdout

    def serve(self, block: Block) -> None:
        with (self.cwd / "server.log").open("wb") as log:
            self.server = subprocess.Popen(
                shlex.split(block.text), cwd=self.cwd, env=self.environ, stdout=log, stderr=log
            )
        wait(lambda: self.get("/readyz") or self.ended(), self.log)
        assert not self.ended(), self.log()

    def ended(self) -> bool:
        return self.server is None or self.server.poll() is not None

    def log(self) -> str:
        return (self.cwd / "server.log").read_text()

    def get(self, path: str) -> bytes | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
                return bytes(answer.read())
        except OSError:
            return None

    def settled(self) -> bool:
        """Whether every prediction so far is in the ledger."""
        text = (self.get("/metrics") or b"").decode()
        counted = re.findall(r'uq_predictions_total\{[^}]*outcome="a[^}]*\} (\S+)', text)
        known = json.loads(self.get("/v1/calibration") or b"{}")
        served = sum(m["served"] for m in known.get("models", []))
        return bool(served == sum(map(float, counted)))

    def stop(self) -> None:
        if self.server is not None and not self.ended():
            self.server.send_signal(signal.SIGTERM)
            assert self.server.wait(60) in (0, -signal.SIGTERM)

    @property
    def _state(self) -> Path:
        return Path(self.environ["XDG_CACHE_HOME"]).parent / "state"


def wait(ask: Callable[[], Any], why: Callable[[], str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ask():
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with held_port() as port:
        reader = Reader(tmp_path, port)
        yield reader
        reader.stop()


@pytest.mark.parametrize("pages", [1, pytest.param(len(PAGES), marks=pytest.mark.long)])
def test_the_walk(reader: Reader, pages: int) -> None:
    """Through the README, and on through the guides in ``make test-long``."""
    printed, last = "", None
    walked = {page.relative_to(ROOT).as_posix() for page in PAGES[:pages]}
    for block in (b for b in BLOCKS if b.page in walked):
        if block.kind == "file":
            (reader.cwd / block.argument).write_text(block.text)
        elif block.kind == "serve":
            reader.serve(block)
        elif block.kind == "walk":
            if reader.server is not None:
                wait(reader.settled, reader.log)
            printed, last = reader.run(block), block
        elif block.kind == "output":
            assert last is not None, block
            deadline = time.monotonic() + DEADLINE_S
            # Counters move a moment after the label: what only asks may ask again.
            asks = "curl" in last.text and " -d" not in last.text and "--data" not in last.text
            while (line := missing(block.text, printed)) is not None:
                assert asks and time.monotonic() < deadline, f"{block}: {line!r} not in\n{printed}"
                printed = reader.run(last)
    for path in ("/", "/page.css", "/page.js", "/schema.json", "/docs.json", "/livez", "/v2"):
        assert reader.get(path), path


def test_names_exist() -> None:
    benchmarks = re.search(r"^NAMES = (\([^)]*\))", (ROOT / "bench/__main__.py").read_text(), re.M)
    assert benchmarks is not None
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.M))
    for block in of("names"):
        for line in filter(None, block.text.splitlines()):
            match shlex.split(line, comments=True):
                case ["make", target, *given]:
                    assert target in targets, (block, target)
                    assert {name.partition("=")[0] for name in given} <= variables, (block, given)
                case ["hedged", command, *_]:
                    assert command in COMMANDS, (block, command)
                case ["python", "-m", "bench", name, *_]:
                    assert name in ast.literal_eval(benchmarks[1]), (block, name)
                case ["python", "-m", module]:
                    assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), (block, module)
                case ["python", file, *_]:
                    assert (ROOT / file).is_file(), (block, file)
                case other:
                    pytest.fail(f"{block}: {other} is none of the known names")


def test_commands_that_run_elsewhere_do() -> None:
    for block in of("elsewhere"):
        path, _, name = block.argument.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        tests = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert name in tests, block


def test_the_image_is_started_as_the_dockerfile_wants() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (block,) = of("dockerfile")
    assert "EXPOSE 3000" in dockerfile and "-p 3000:3000" in block.text
    assert 'CMD ["/bundles"]' in dockerfile and ":/bundles:ro" in block.text
    assert "VOLUME /data" in dockerfile and ":/data" in block.text


@pytest.mark.long
def test_the_demo_prints_what_is_quoted(tmp_path: Path) -> None:
    for block in of("long"):
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(block.argument)],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if not k.startswith("HEDGED_")},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr
        assert missing(block.text, done.stdout) is None
