"""The report in a real browser, wide and on a phone: every figure drawn, nothing fetched."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from calibration.evaluate import evaluate
from calibration.evaluation import Evaluation
from calibration.report import write_report
from posthoc.contract import Task
from tests import factory
from tests.calibration import simulated
from tests.calibration.conftest import BROWSER
from tests.calibration.evaluation import dense_bundles

PHONE, DESK = 390, 1400
# Appended to a copy of the report: what the page measures of itself, as an attribute.
PROBE = """<script>
window.addEventListener("load", () => {
  const plots = [...document.querySelectorAll(".plot")];
  const seen = {
    width: document.documentElement.clientWidth,
    scroll: document.documentElement.scrollWidth,
    fetched: performance.getEntriesByType("resource").length,
    plots: plots.map((p) => [p.id, p.querySelectorAll("svg.main-svg").length,
      p.querySelectorAll(".trace, .bars .point").length, p.getBoundingClientRect().right]),
    images: [...document.images].map((i) => [i.naturalWidth, i.naturalHeight,
      i.getBoundingClientRect().width, i.getBoundingClientRect().right]),
  };
  parent.document.documentElement.setAttribute("data-seen", JSON.stringify(seen));
});
</script>"""


def browse(page: Path, profile: Path, width: int) -> tuple[str, str]:
    """The DOM after all scripts ran, and what the browser logged."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--enable-logging=stderr",
            "--hide-scrollbars",
            "--allow-file-access-from-files",
            f"--user-data-dir={profile}",
            f"--window-size={width},3000",
            "--virtual-time-budget=20000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_every_figure_is_drawn_and_nothing_fetched(task: str, width: int, tmp_path: Path) -> None:
    seen = look(getattr(simulated, task)(n=600), width, tmp_path)
    assert seen["images"] == []


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_sets_side_by_side_and_under_corruption(
    task: Task, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(f"{task}_bundle")
    data = {n: factory.data(tmp_path / f"{n}.parquet", task, 300, 50 + len(n)) for n in ("a", "bb")}
    strange = {"other": data["bb"]}
    found = evaluate(bundle, data, ood_data=strange, corrupt=["all"], severities=[2, 5])
    seen = look(found, width, tmp_path)
    drawn = {key for key, *_ in seen["plots"]}
    assert {"under-corruption", "confidence", "spreads", "coverage"} <= drawn
    assert {"classification": "risk-coverage", "regression": "pit"}[task] in drawn
    assert (tmp_path / "report.html").stat().st_size < 8_000_000


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_pictures_of_maps_are_drawn(width: int, tmp_path: Path) -> None:
    found = dense_bundles.evaluation("classification", tmp_path / "bundle")
    assert found.dense is not None
    seen = look(found, width, tmp_path)
    assert len(seen["images"]) == sum(len(p.maps) for p in found.dense.pictures)
    for wide, high, shown, right in seen["images"]:
        assert (wide, high) == (dense_bundles.WIDE, dense_bundles.HIGH)
        assert shown >= 90 and right <= width


def look(evaluation: Evaluation, width: int, tmp_path: Path) -> dict[str, Any]:
    """What the page of ``evaluation`` measures of itself in a frame of this width."""
    report = tmp_path / "report.html"
    write_report(report, evaluation)
    text = report.read_text(encoding="utf-8")
    report.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    # A headless window is never narrower than 500 pixels; a frame is.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe width="{width}" height="3000" frameborder="0" '
        'src="report.html"></iframe>'
    )
    dom, log = browse(frame, tmp_path / "profile", width + 100)
    assert "CONSOLE" not in log, log
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found is not None

    seen: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    assert seen["width"] == width
    assert seen["scroll"] == width  # nothing sticks out sideways
    assert seen["fetched"] == 0
    assert len(seen["plots"]) >= 5
    for key, svgs, traces, right in seen["plots"]:
        assert svgs >= 1 and traces >= 1, key
        assert right <= width, key
    return seen
