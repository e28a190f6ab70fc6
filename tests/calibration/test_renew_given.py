"""Renewing bundles with thresholds for groups, and bundles whose rows were weighted for a shift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibration.bundle import Bundle, load_bundle
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.metrics.coverage import coverage_band
from calibration.predictor import Predictor
from calibration.renew.renewal import renew
from calibration.renew.write import write_renewed
from posthoc.contract import BundleError, Task
from tests.calibration.renewals import WINDOW, moved, served, truth
from tests.factory import CLASSES, COLUMNS, frozen_model, rows

GROUPS = ("east", "north", "west")


def fitted(
    folder: Path, task: Task, columns: dict[str, Any], n: int = 4000, **options: Any
) -> Bundle:
    """A bundle of the factory's network over n rows of its own, with more columns."""
    x, y = rows(task, n, 1)
    named: Any = np.asarray(CLASSES)[y] if task == "classification" else y
    table = {c: x[:, i] for i, c in enumerate(COLUMNS[task])} | {"target": named} | columns
    pq.write_table(pa.table(table), folder / "data.parquet")
    production = {}
    if "shift" in options:
        new, _ = rows(task, n // 2, 2)
        path = folder / "production.parquet"
        pq.write_table(pa.table({c: new[:, i] for i, c in enumerate(COLUMNS[task])}), path)
        production = {"production": path}
    return fit(
        frozen_model(folder / "model.onnx", task),
        folder / "data.parquet",
        folder / "bundle",
        FitOptions(task=task, **options),
        name="tiny",
        columns=Columns(
            target="target",
            inputs={"x": COLUMNS[task]},
            group="group" if "group" in columns else None,
            split_by="item" if "item" in columns else None,
            classes=CLASSES if task == "classification" else None,
        ),
        cache_dir=folder / "cache",
        **production,
    )


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_groups_have_new_thresholds_of_their_own(tmp_path: Path, task: Task) -> None:
    """One group alone has moved: its coverage comes back, and nobody's goes."""
    group = np.asarray(GROUPS)[np.arange(4000) % 3]
    old = fitted(tmp_path, task, {"group": group}, given="group", alphas=(0.1, 0.2))
    spreads = (2.0, 6.0) if task == "classification" else (0.3, 0.8)

    def fresh(n: int, seed: int) -> tuple[Any, Any, Any]:
        x, _ = rows(task, n, seed)
        codes = np.arange(n) % 4  # the fourth is a group that nobody knows
        calm, wild = (truth(task, x, s, seed + 500) for s in spreads)
        return x, np.where(codes.reshape(-1, *[1] * (calm.ndim - 1)) == 1, wild, calm), codes

    found = renew(old, served(old.path, *fresh(8000, 50)), WINDOW)
    assert found.comparison.publish
    assert any("north" in cell for cell in found.comparison.before.levels[0].outside)
    assert found.comparison.after.levels[0].outside == ()
    assert "of the rarest group" in found.needs[0].what
    new = write_renewed(found, tmp_path / "new", "2")
    x, y, codes = fresh(8000, 51)
    for bundle, returned in ((old, False), (new, True)):
        out = Predictor(bundle).run({"x": x, "group": codes})
        if task == "classification":
            inside = out["set"][np.arange(len(y)), y]
        else:
            inside = ((out["lower"] <= y) & (y <= out["upper"])).all(1)
        cells = bundle.manifest.conformal.guarantees[0].cells
        assert [c.name for c in cells] == list(GROUPS)
        kept = []
        for code, cell in enumerate(cells):
            own = codes == code
            low, high = coverage_band(cell.n, int(own.sum()), 0.1, level=0.997)
            kept.append(low <= inside[own].mean() <= high)
        assert all(kept) == returned


def test_weights_for_classes_are_dropped(tmp_path: Path) -> None:
    """Labelled rows of production need none; the graph takes one threshold again."""
    old = fitted(tmp_path, "classification", {}, shift="target", alphas=(0.1, 0.2))
    assert old.manifest.conformal.shift == "target"
    found = renew(old, moved(old.path, "classification", 5.0), WINDOW)
    new = write_renewed(found, tmp_path / "new", "2")
    conformal = new.manifest.conformal
    assert conformal.shift is None and conformal.weights == {}
    assert conformal.guarantees[0].threshold is not None
    assert set(new.conformal_scores) == {"set", "ood"}
    x, _ = rows("classification", 4000, 70)
    y = truth("classification", x, 5.0, 71)
    predictor = Predictor(new)
    for alpha in (0.1, 0.2, 0.3):
        share = predictor.run({"x": x}, q_hat=predictor.q_hat(alpha))["set"][np.arange(4000), y]
        low, high = coverage_band(conformal.guarantees[0].n, 4000, alpha)
        assert low <= share.mean() <= high
    assert any("dropped" in k for k in found.renewed)


def test_weights_of_a_row_are_refused(tmp_path: Path) -> None:
    old = fitted(tmp_path, "classification", {}, 1200, shift="covariate", alphas=(0.2,))
    for only in (None, "conformal"):
        with pytest.raises(BundleError, match=r"--shift covariate.*fit again on them"):
            renew(old, moved(old.path, "classification", 5.0), WINDOW, only=only)  # type: ignore[arg-type]


def test_rows_of_one_item_are_said_to_be_no_independent_evidence(tmp_path: Path) -> None:
    old = fitted(tmp_path, "classification", {"item": np.arange(4000) // 2})
    found = renew(old, moved(old.path, "classification", 5.0), WINDOW)
    new = write_renewed(found, tmp_path / "new", "2")
    assert any("which rows are of one item: they count as several" in n for n in new.manifest.notes)
    assert load_bundle(new.path).manifest == new.manifest
