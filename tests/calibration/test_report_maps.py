"""The report of a dense bundle: figures, tables and pictures in one file that loads nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import plotly.graph_objects as go
import pytest
from rich.console import Console

from calibration.evaluation import Evaluation
from calibration.report import render, write_report
from hedged.commands import console
from hedged.commands.evaluate import show
from tests.calibration.evaluation.dense_bundles import evaluation
from tests.calibration.pages import Page, read

KEYS = {
    "classification": ["reliability", "coverage", "uncovered", "set-sizes", "sparsification"],
    "regression": [
        "pit",
        "quantiles",
        "variance",
        "coverage",
        "uncovered",
        "sparsification",
        "widths",
        "width-coverage",
    ],
}
SCORES = {"classification": 6, "regression": 4}


@pytest.fixture(scope="module", params=sorted(KEYS))
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(task: str, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return evaluation(task, tmp_path_factory.mktemp(task))


@pytest.fixture(scope="module")
def page(found: Evaluation) -> Page:
    return read(render(found))


def test_figures(task: str, page: Page) -> None:
    assert page.ids() == [*KEYS[task], *(f"scores-{i}" for i in range(SCORES[task]))]
    data = re.search(r"const figures = (\[.*?\]);\n", page.scripts[-1])
    assert data is not None
    for figure in json.loads(data.group(1)):
        painted = json.loads(re.sub(r"var\(--[a-z0-9-]+\)", "rgb(1, 2, 3)", json.dumps(figure)))
        assert go.Figure(data=painted["data"], layout=painted["layout"]).data


def test_pictures_are_inside_the_file_and_described(
    task: str, found: Evaluation, page: Page, tmp_path: Path
) -> None:
    assert found.dense is not None
    images = [a for t, a in page.tags if t == "img"]
    wanted = [m for p in found.dense.pictures for m in p.maps]
    assert [a["alt"] for a in images] == [m.alt for m in wanted]
    assert all(a["src"].startswith("data:image/png;base64,iVBOR") for a in images)
    assert page.loads() == [a["src"] for a in images]
    assert len(found.dense.pictures) in (3, 4) and len(wanted) >= 24
    for p in found.dense.pictures:
        assert p.title in page.text and p.note in page.text
    assert bool(found.dense.swatches) == (task == "classification")
    write_report(tmp_path / "report.html", found)
    assert (tmp_path / "report.html").stat().st_size < 8_000_000


def test_the_unit_is_the_image(found: Evaluation, page: Page) -> None:
    assert f"{found.n:,}" in page.text
    for said in (
        "Test images",
        "Conformal images",
        "over resampled images",
        "Strange images and pixels",
        "Uncovered pixels by image at level 90 %",
        "256 pixels at most were drawn",
    ):
        assert said in page.text, said
    assert "rows" not in page.text
    level = found.levels[0]
    assert level.images is not None
    assert f"{100 * level.images.mean.value:.2f} %" in page.text


def test_the_table_of_the_terminal(
    task: str, found: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Console(record=True, width=140, file=None, quiet=False)
    monkeypatch.setattr(console, "out", recorded)
    show(found)
    text = recorded.export_text()
    assert f"{found.n} images (95 % intervals)" in text
    names = ("mean_iou", "class 2") if task == "classification" else ("uce", "ause", "spearman")
    for name in (*names, "of an image's pixels", "pixel by pixel tells noise"):
        assert name in text
    assert "rows" not in text


def test_from_json_comes_the_same_report(found: Evaluation) -> None:
    again = Evaluation.model_validate_json(found.model_dump_json())
    assert render(again) == render(found)
