"""What the pages of the documentation and every ``--help`` say, against the code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from starlette.routing import Route

from calibration import bundle
from docs.pages import OUTSIDE, build, pages
from hedged.cli import app
from posthoc import registry
from service import metrics
from service.core import Core
from service.later import Later
from service.routes import service_routes
from service.scoring.errors import Interrupted
from tests.documentation import (
    COMMANDS,
    PAGES,
    PART,
    PARTS,
    ROOT,
    help_text,
    metric_families,
    renewed,
)

GROUP = typer.main.get_command(app)
NAMES = [p.relative_to(ROOT).as_posix() for p in PAGES]
MAX_PICTURE = 300_000


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_parts_made_from_the_code_are_up_to_date() -> None:
    found = [m[2] for name in NAMES for m in PART.finditer(text_of(name))]
    assert sorted(found) == sorted(PARTS)
    for name in NAMES:
        assert renewed(text_of(name)) == text_of(name), "renew it: python -m tests.documentation"


def test_every_metric_is_listed_and_no_other() -> None:
    ends = {"histogram": ("_bucket", "_sum", "_count")}
    names = set()
    for name, metric in metric_families().items():
        assert f"`{name}`" in text_of("docs/reference/metrics.md")
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
    listed = set(re.findall(r"^\| ([A-Z]+) \| `(\S+)` \|", text_of("docs/reference/http.md"), re.M))
    assert listed == served


def test_the_files_of_a_bundle(classification_bundle: Path) -> None:
    listed = set(re.findall(r"^\| `(\S+)` \|", text_of("docs/reference/bundle.md"), re.M))
    assert listed == {p.name for p in classification_bundle.iterdir()}
    assert bundle.SCHEMA_VERSION == 1


def test_the_readme_counts_the_scores_that_there_are() -> None:
    assert f"| {len(registry.SCORES)}, chosen by held-out classes |" in text_of("README.md")


def test_every_page_is_in_the_navigation() -> None:
    found = {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert found | {"README.md", "CONTRIBUTING.md"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_links_and_paths_lead_somewhere(name: str) -> None:
    text = text_of(name)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("http://", "https://")):
            place, _, anchor = target.partition("#")
            file = (ROOT / name).parent / place if place else ROOT / name
            assert file.is_file(), target
            heads = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M) if anchor else []
            assert not anchor or anchor in map(slug, heads), target
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    tops = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0] not in "._")
    for path in re.findall(rf"`((?:{tops})/[\w/.-]+)`", prose):
        if "NAME" not in path and not path.startswith(("demo/", "build/")):
            assert (ROOT / path).exists(), path


def slug(heading: str) -> str:
    """A heading's anchor."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def test_the_site_is_built_of_every_page(tmp_path: Path) -> None:
    build(tmp_path)
    for page, _ in pages():
        name = page.removesuffix(".md").removesuffix("index")
        text = (tmp_path / name / "index.html").read_text("utf-8")
        assert "<h1" in text
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?(https?:[^\"' >]+)", text)
        assert loaded == []


def test_a_broken_link_ends_the_build_of_the_site(tmp_path: Path) -> None:
    for name in ("docs", "zensical.toml", *OUTSIDE.values()):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    page = tmp_path / "docs" / "guides" / "maps.md"
    page.write_text(page.read_text("utf-8") + "\n[gone](nowhere.md)\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "docs/pages.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "page does not exist" in done.stderr


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


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_the_text_exist(name: str) -> None:
    text = text_of(name)
    assert set(re.findall(r"`hedged ([a-z]+)", text)) <= {*COMMANDS}
    for one in re.findall(r"python -m bench ([a-z_]+)", text):
        assert (ROOT / "bench" / f"{one}.py").is_file(), one
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets


def test_pictures_are_small_and_shown() -> None:
    picture = re.compile(r"!\[[^\]]{40,}\]\(\S*?(pictures/\w+\.png)\)")
    shown = {f"docs/{found}" for name in NAMES for found in picture.findall(text_of(name))}
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
    listed = re.findall(r"^\| (\d+) \| ", text_of("docs/reference/commands.md"), re.M)
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
