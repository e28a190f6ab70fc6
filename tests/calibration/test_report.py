"""The report as a file: self-contained, escaped, with every figure valid for plotly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from calibration.evaluation import Evaluation
from calibration.evaluation.parts import Named, Places
from calibration.evaluation.records import SetSummary
from calibration.figures import panels
from calibration.report import render, write_report
from tests.calibration import simulated
from tests.calibration.pages import Page, read

EVALUATIONS = {
    "classification": simulated.classification(n=800),
    "regression": simulated.regression(n=800),
}
KEYS = {
    "classification": [
        "reliability",
        "confidence",
        "risk-coverage",
        "coverage",
        "set-sizes",
        "spreads",
        "scores-0",
        "scores-1",
    ],
    "regression": [
        "confidence",
        "pit",
        "quantiles",
        "coverage",
        "widths",
        "width-coverage",
        "spreads",
        "scores-0",
    ],
}


@pytest.fixture(scope="module", params=sorted(EVALUATIONS))
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def page(task: str) -> Page:
    return read(render(EVALUATIONS[task]))


def figures(page: Page) -> list[dict[str, object]]:
    """The figures that the page's last script draws, as JSON."""
    found = re.search(r"const figures = (\[.*?\]);\n", page.scripts[-1])
    assert found is not None
    return list(json.loads(found.group(1)))


def test_one_file_that_loads_nothing_else(task: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, EVALUATIONS[task])
    assert path.stat().st_size < 8_000_000
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    page = read(path.read_text(encoding="utf-8"))
    assert page.loads() == []
    policies = [a for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policies[0]["content"]
    assert "http" not in policies[0]["content"]


def test_every_figure_has_its_place_and_its_sentence(task: str, page: Page) -> None:
    assert page.ids() == KEYS[task]
    assert [f["key"] for f in figures(page)] == KEYS[task]
    for panel in panels(EVALUATIONS[task]):
        assert panel.title in page.text and panel.meaning in page.text
        assert panel.meaning.endswith(".")


def test_plotly_accepts_every_figure(page: Page) -> None:
    style = page.styles[0]
    for figure in figures(page):
        text = json.dumps(figure)
        for colour in re.findall(r"var\((--[a-z0-9-]+)\)", text):
            # Once for the light scheme and once for the dark.
            assert style.count(f"{colour}:") == 2, colour
        painted = json.loads(re.sub(r"var\(--[a-z0-9-]+\)", "rgb(1, 2, 3)", text))
        assert go.Figure(data=painted["data"], layout=painted["layout"]).data


def test_tables_hold_the_numbers(task: str, page: Page) -> None:
    evaluation = EVALUATIONS[task]
    for s in evaluation.systems:
        assert s.name in page.text
        assert f"{s.metrics['nll'].value:.4f}".replace("-", "−") in page.text
    for level in evaluation.levels:
        assert f"{100 * level.coverage:.2f} %" in page.text
    assert f"{evaluation.n:,}" in page.text


def test_figures_that_few_ask_for_are_folded_away() -> None:
    text = render(EVALUATIONS["classification"])
    shown, folded = text.split("<details>")
    folded = folded.split("</details>")[0]
    for title in ("KS error", "ECE by class", "Brier: reliability", "E-AURC"):
        assert title in folded and title not in shown
    assert "ECE, smooth" in shown and "Error at 90 %" in shown
    assert "<details>" not in render(EVALUATIONS["regression"])


def test_parts_of_the_rows_are_tables() -> None:
    evil = "<img src=http://x>"
    names = np.array([evil, "b"])[np.arange(400) % 2]
    for shown in (
        simulated.classification(n=400, named=Named(names, {})),
        simulated.regression(n=400, named=Named(names, {})),
    ):
        page = read(render(shown))
        assert page.loads() == [] and evil in page.text
        assert "least covered first" in page.text and "worst slice" in page.text
        for part in shown.levels[0].groups:
            assert f"{100 * part.coverage:.2f} %" in page.text
    bare = read(render(simulated.classification(n=100))).text
    assert "least covered first" not in bare and "worst slice" not in bare  # too few rows
    assert "Off by set size" in bare


def test_names_are_data_and_never_markup() -> None:
    evil = "</script><script>alert(1)</script>{{plotly}}<img src=http://x>"
    shown = simulated.classification(
        n=100,
        about={"model": evil, evil: evil},
        ood_in={evil: [0.0] * 100},
        ood_out={evil: {evil: [1.0] * 10}},
        ood_doubts={evil: [0.5] * 10},
        classes=[evil, *"abcde"],
        places=Places(np.arange(100), np.full(100, evil)),
        named=Named(np.full(100, evil), {}),
    )
    one = SetSummary(name=evil, n=1, metrics=shown.systems[-1].metrics, corruption=evil, severity=1)
    shown = shown.model_copy(update={"sets": (one, one)})
    page = read(render(shown))
    assert page.loads() == []
    assert len(page.scripts) == 2
    assert evil in page.text
    assert figures(page)[-1]["data"][1]["name"] == evil  # type: ignore[index]


def test_an_evaluation_from_json_gives_the_same_report() -> None:
    evaluation = EVALUATIONS["regression"]
    again = Evaluation.model_validate_json(evaluation.model_dump_json())
    assert render(again) == render(evaluation)


def test_a_report_without_strange_rows_sets_or_baselines() -> None:
    bare = simulated.classification(
        n=100,
        sets={},
        ood_in=None,
        ood_out=None,
        ood_doubts=None,
        scaled_probs=None,
        about=None,
        places=None,
    )
    assert read(render(bare)).ids() == ["reliability", "confidence", "risk-coverage"]
    assert not bare.worst and "Confident and wrong" not in render(bare)
    alone = simulated.regression(
        n=100, intervals={}, constant_std=None, ood_in={}, ood_out={}, ood_doubts=None
    )
    assert read(render(alone)).ids() == ["pit", "quantiles"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.mkdir()
    with pytest.raises(OSError):
        write_report(target, EVALUATIONS["regression"])
    assert list(tmp_path.iterdir()) == [target]
