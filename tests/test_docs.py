"""What the README, CONTRIBUTING and every ``--help`` say, against the code."""

from __future__ import annotations

import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from starlette.routing import Route

from calibration import bundle
from hedged.cli import app
from service import metrics
from service.core import Core
from service.later import Later
from service.routes import service_routes
from service.scoring.errors import Interrupted
from tests.documentation import (
    COMMANDS,
    PART,
    PARTS,
    README,
    ROOT,
    help_text,
    metric_families,
    renewed,
)

GROUP = typer.main.get_command(app)
PAGES = (README, ROOT / "CONTRIBUTING.md")
MAX_PICTURE = 300_000


def readme() -> str:
    return README.read_text("utf-8")


def section(title: str) -> str:
    """The text below a heading of the README."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", readme(), re.M | re.S)
    assert found is not None, title
    return found[1]


def test_parts_made_from_the_code_are_up_to_date() -> None:
    assert sorted(m[2] for m in PART.finditer(readme())) == sorted(PARTS)
    assert renewed(readme()) == readme(), "renew it: python -m tests.documentation"


def test_every_metric_is_listed_and_no_other() -> None:
    ends = {"histogram": ("_bucket", "_sum", "_count")}
    names = set()
    for name, metric in metric_families().items():
        assert f"`{name}`" in section("Metrics")
        kind = next(iter(metric.describe())).type
        names |= {name + end for end in ends.get(kind, ("",))}
    assert names == metrics.METRIC_NAMES


def test_every_route_is_listed_and_no_other() -> None:
    def nobody() -> Core:
        raise AssertionError

    served = {
        (method, route.path)
        for route in service_routes(nobody, Later())
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    listed = set(re.findall(r"^\| ([A-Z]+) \| `(\S+)` \|", section("HTTP"), re.M))
    assert listed == served


def test_the_files_of_a_bundle(classification_bundle: Path) -> None:
    listed = set(re.findall(r"^\| `(\S+)` \|", section("The files of a bundle"), re.M))
    assert listed == {p.name for p in classification_bundle.iterdir()}
    assert bundle.SCHEMA_VERSION == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / target).is_file(), target
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    tops = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0] not in "._")
    for path in re.findall(rf"`((?:{tops})/[\w/.-]+)`", prose):
        if "NAME" not in path and not path.startswith("demo/"):
            assert (ROOT / path).exists(), path


def test_the_map_of_the_house() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    found = re.search(r"```text\n(posthoc/.*?)```", text, re.S)
    assert found is not None
    parts = re.split(r"^(\w+)/ ", found[1], flags=re.M)[1:]
    for floor, rest in zip(parts[::2], parts[1::2], strict=True):
        folder = ROOT / floor
        for name in re.findall(r"\b([a-z_]+\.py)\b", rest):
            assert list(folder.rglob(name)), f"{floor}: {name}"
        for name in re.findall(r"(?<![\w/])([a-z_]+)/(?![\w*])", rest):
            assert (folder / name).is_dir(), f"{floor}: {name}/"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_text_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    assert set(re.findall(r"`hedged ([a-z]+)", text)) <= {*COMMANDS}
    for name in re.findall(r"python -m bench ([a-z]+)", text):
        assert (ROOT / "bench" / f"{name}.py").is_file(), name
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets


def test_pictures_are_small_and_shown() -> None:
    shown = set(re.findall(r"!\[[^\]]{40,}\]\((docs/pictures/\w+\.png)\)", readme()))
    assert shown == {p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/pictures/*")}
    for name in shown:
        data = (ROOT / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) < MAX_PICTURE, name
        width, height = struct.unpack(">II", data[16:24])
        assert 600 <= width <= 1600 and 400 <= height <= 2400, name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_a_word_on_everything(name: str) -> None:
    text = help_text(name)
    assert all(len(line) <= 80 for line in text.splitlines())
    _, colon, after = text.partition("Example")
    assert colon, "no example"
    shown = re.split(r"\n\n", after)[0].replace("\\\n", " ")
    examples = [shlex.split(x) for x in shown.splitlines() if x.strip().startswith("hedged ")]
    assert examples
    params = GROUP.commands[name].params  # type: ignore[attr-defined]
    flags = {o for p in params for o in p.opts}
    required = {p.opts[0] for p in params if p.required and p.param_type_name == "option"}
    for example in examples:
        assert example[1] == name
        used = {word for word in example[2:] if word.startswith("-") and not word[1:2].isdigit()}
        assert used <= flags, used - flags
        assert all(set(p.opts) & used for p in params if p.opts[0] in required), example
    for param in params:
        assert getattr(param, "help", None), param.name


def hedged(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("HEDGED_")}
    return subprocess.run(
        [sys.executable, "-m", "hedged", *arguments],
        env=plain | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_exit_codes() -> None:
    listed = re.findall(r"^\| (\d+) \| ", section("Commands"), re.M)
    assert listed == ["0", "1", "2", "3", "75"]
    assert hedged("--version").returncode == 0
    mendable = hedged("verify", "nowhere")
    assert mendable.returncode == 1
    assert mendable.stderr.strip() == "hedged: nowhere is not a bundle: no such folder"
    assert hedged("fit", "model.onnx").returncode == 2
    assert hedged("verify", "nowhere", "--devise", "cpu").returncode == 2
    assert Interrupted.exit_code == 75


def test_a_flag_comes_before_its_variable_and_that_before_the_file(
    classification_bundle: Path, tmp_path: Path
) -> None:
    config = tmp_path / "hedged.toml"
    config.write_text('[verify]\ndevice = "file"\n')
    command = ("--config", str(config), "verify", str(classification_bundle))
    variable = {"HEDGED_VERIFY_DEVICE": "variable"}
    for done, device in (
        (hedged(*command), "file"),
        (hedged(*command, **variable), "variable"),
        (hedged(*command, "--device", "flag", **variable), "flag"),
    ):
        assert done.returncode == 1 and f"'{device}'" in done.stderr, done.stderr
    config.write_text('[verify]\ndevise = "cpu"\n')
    wrong = hedged(*command)
    assert wrong.returncode == 1 and "no option 'devise'" in wrong.stderr


def test_variables_of_other_commands_do_not_stop_the_server(tmp_path: Path) -> None:
    config = tmp_path / "hedged.toml"
    config.write_text("[serve]\n")
    environ = {"HEDGED_FIT_METHOD": "none", "HEDGED_CONFIG": str(config)}
    missing = hedged("serve", str(tmp_path / "none"), HEDGED_DATA_DIR=str(tmp_path), **environ)
    assert missing.returncode != 0
    assert "no such folder" in missing.stderr + missing.stdout
    unknown = hedged("serve", str(tmp_path), HEDGED_MAX_RWOS="5", **environ)
    assert unknown.returncode == 1 and "HEDGED_MAX_RWOS" in unknown.stderr
