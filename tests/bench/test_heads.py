"""The quality table: means and paired differences by hand, and the page made of them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from bench import heads, table
from bench.results import kept
from bench.suite import suite
from calibration.comparison.candidates import BASELINE, Candidate
from calibration.comparison.measure import Measured

ROOT = Path(__file__).resolve().parents[2]


def records() -> list[dict[str, object]]:
    rows = []
    for seed, (base, own) in enumerate([(0.50, 0.48), (0.52, 0.49)]):
        for module, nll in (("none", base), ("laplace", own)):
            rows.append(
                {
                    "set": "satimage",
                    "seed": seed,
                    "module": module,
                    "nll": nll,
                    "nll_difference": nll - base,
                }
            )
    rows.append({"set": "satimage", "seed": 0, "module": "icla", "error": "no rows"})
    return rows


def test_means_over_splits() -> None:
    made = {r["module"]: r for r in heads.summarise(records())}
    assert made["laplace"]["nll"] == pytest.approx(0.485)
    assert made["laplace"]["nll_difference"] == pytest.approx(-0.025)
    assert made["laplace"]["nll_difference_sd"] == pytest.approx(0.005 * math.sqrt(2))
    assert made["icla"]["errors"] == ["no rows"] and made["icla"]["splits"] == 0


def test_the_page_shows_what_lost_and_what_failed() -> None:
    rows = heads.summarise(records())
    rows.append({"set": "satimage", "module": "mixup", "splits": 2, "nll_difference": 0.01})
    page = table.render({"splits": 2, "margin": 0.002, "worse": ["satimage/mixup"], "table": rows})
    assert "satimage/mixup" in page and "no rows" in page
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    found = [re.match(r"\| `(\w+)`", line)[1] for line in lines if "±" in line or "–" in line]
    assert found[:2] == ["none", "laplace"]  # the system to beat, then the best first
    assert "| `mixup` | +0.0100 | 0 | 1 | 1 |" in page


def test_pairing_is_by_row() -> None:
    base = Measured(BASELINE, 0, losses={"nll": np.asarray([1.0, 2.0, 3.0])})
    own = Measured(Candidate("laplace"), 0, losses={"nll": np.asarray([0.5, 2.5, 2.4])})
    found = heads._record("letter", own, base)
    assert found["nll_difference"] == pytest.approx((-0.5 + 0.5 - 0.6) / 3)


def test_a_real_split_of_a_small_set() -> None:
    """Every module that fits a regression is measured, and none loses on one split by much."""
    found = {r["module"]: r for r in heads.one_split("concrete", 0)}
    assert "error" not in str(found)
    assert {"none", "laplace", "student_t", "vbll", "vbll_t", "bootstrap", "loss"} <= set(found)
    for r in found.values():
        assert math.isfinite(r["nll"]) and r["nll_difference"] < 0.1


@pytest.mark.parametrize(("name", "page"), [("heads", "quality.md"), ("dense", "dense.md")])
def test_the_page_is_made_of_what_is_kept(name: str, page: str) -> None:
    found = kept(name)
    assert found is not None
    assert table.page(found) == (ROOT / "docs" / page).read_text("utf-8")


def test_the_guide_quotes_the_page() -> None:
    """The summary in the guide is that of docs/quality.md, line by line."""
    page = (ROOT / "docs" / "quality.md").read_text("utf-8")
    guide = (ROOT / "docs" / "guides" / "choose.md").read_text("utf-8")
    start = page.index("## In one table")
    lines = page[start : page.index("## ", start + 5)].splitlines()
    quoted = [line for line in lines if line.startswith("| ")]
    assert len(quoted) > 15
    assert all(line in guide for line in quoted)
    for chosen in suite():
        assert f"## {chosen.name}\n" in page
