"""Coverage by the group column of a table, from the bundle to the terminal and the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibration.bundle import load_bundle
from calibration.evaluate import evaluate
from calibration.metrics.coverage import coverage_band
from calibration.predictor import Predictor
from calibration.report import render
from hedged.commands.evaluate import show
from tests.calibration.pages import read
from tests.calibration.test_given import CLASSES, grouped, regions, rows, table


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped(tmp_path_factory.mktemp("named"), "classification")


def test_each_group_beside_the_band_of_its_own_conformal_rows(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = table(tmp_path / "fresh.parquet", "classification", 1500, 11)
    found = evaluate(bundle, fresh)
    predictor, region = Predictor(bundle), regions(1500)
    x, _ = rows("classification", 1500, 11)
    y = [CLASSES.index(c) for c in pq.read_table(fresh)["target"].to_pylist()]
    guarantees = {g.alpha: g for g in load_bundle(bundle).manifest.conformal.guarantees}
    for level in found.levels:
        q_hat = predictor.q_hat(level.alpha)
        sets = predictor.run({"x": x, "group": predictor.group_codes(region)}, q_hat=q_hat)["set"]
        inside = sets[np.arange(1500), y]
        behind = {c.name: c.n for c in guarantees[level.alpha].cells}
        assert {p.name for p in level.groups} == set(behind)
        for part in level.groups:
            here = region == part.name
            assert part.n == here.sum()
            assert part.coverage == pytest.approx(inside[here].mean())
            ends = coverage_band(behind[part.name], part.n, level.alpha)
            assert (part.band_low, part.band_high) == ends
    show(found)
    said = capsys.readouterr().out
    page = read(render(found)).text
    for part in found.levels[0].groups:
        assert f"  {part.name}: coverage {part.coverage:.4f} of {part.n}" in said
        assert part.name in page


def test_rows_without_a_group_are_dropped_and_a_group_nobody_knew_is_named(
    bundle: Path, tmp_path: Path
) -> None:
    path = table(tmp_path / "some.parquet", "classification", 400, 12)
    kept = pq.read_table(path)
    some = [None if i % 2 else "west" for i in range(400)]
    at = kept.column_names.index("region")
    pq.write_table(kept.set_column(at, "region", pa.array(some)), path)
    found = evaluate(bundle, path)
    level = found.levels[0]
    (part,) = level.groups
    assert (part.name, part.n, found.n) == ("west", 200, 200)
    assert part.coverage == pytest.approx(level.coverage)
    n = load_bundle(bundle).manifest.conformal.guarantees[0].n  # the threshold of all rows
    assert (part.band_low, part.band_high) == coverage_band(n, 200, level.alpha)
