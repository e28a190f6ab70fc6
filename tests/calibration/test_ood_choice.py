"""The score that a fit chooses by itself: on what, among what, and what is told of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hedged
from calibration.bundle import load_bundle
from calibration.fit import fit_material
from calibration.fit_ood import fit_ood
from calibration.fit_options import FitOptions
from calibration.material import Columns, parts_of, prepare, split
from calibration.metrics.ranking import auroc
from calibration.ood_choice import DEFAULT, MIXTURES, choose_score
from calibration.proxies import HELD_OUT, held_out_classes
from calibration.strange import CORRUPTED, corrupted_sets
from posthoc.contract import DataError, Features, FitError, LinearHead
from tests.factory import CLASSES, COLUMNS, data, frozen_model

C, D = 6, 8


def parts(n: int, seed: int) -> tuple[LinearHead, Features]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n)
    head = LinearHead(np.eye(C, D) * 2, np.zeros(C))
    phi = rng.normal(size=(n, D)) + 2.5 * np.eye(C, D)[y]
    return head, Features(phi, phi @ head.weight.T, y)


def test_the_choice_is_the_best_of_the_proxies() -> None:
    head, module = parts(800, 0)
    _, calibration = parts(500, 1)
    choice = choose_score(head, module, calibration, "classification")
    assert set(choice.tried) == set(MIXTURES)
    by = {s: told[HELD_OUT] for s, told in choice.tried.items()}
    assert choice.score == max(by, key=by.__getitem__)
    proxies = list(held_out_classes(head, module, calibration))

    each = []
    for p in proxies:
        ood = fit_ood(p.linear, p.module, p.calibration, task="classification", ood="gen+mds")
        each.append(auroc(*(ood.score(r.phi, r.z) for r in (p.inside, p.outside))))
    assert by["gen+mds"] == pytest.approx(np.mean(each))


def test_strange_rows_of_the_user_count_as_much_as_held_out_classes() -> None:
    head, module = parts(800, 0)
    _, calibration = parts(500, 1)
    rng = np.random.default_rng(2)
    # Far along what the head does not see: distances tell it, outputs hardly do.
    phi = np.asarray(parts(300, 3)[1].phi) + 6 * (np.arange(D) >= C)
    far = {"far": ("mine", Features(phi, phi @ head.weight.T))}
    near = {"noise": (CORRUPTED, Features(rng.normal(size=(300, D)), np.zeros((300, C))))}
    choice = choose_score(head, module, calibration, "classification", strange=far | near)
    for told in choice.tried.values():
        assert set(told) == {HELD_OUT, "mine", CORRUPTED}
    means = {s: np.mean(list(t.values())) for s, t in choice.tried.items()}
    assert choice.score == max(means, key=means.__getitem__)


def test_without_proxies_there_is_a_default() -> None:
    head, module = parts(400, 0)
    two = module.y < 2  # of two classes none can be held out
    pair = Features(module.phi[two], module.z[two][:, :2], module.y[two])
    small = LinearHead(head.weight[:2], head.bias[:2])
    assert choose_score(small, pair, pair, "classification").score == DEFAULT["classification"][0]
    bare = Features(None, module.z, module.y)
    assert choose_score(None, bare, bare, "classification").score == "gen"
    value = Features(module.phi, module.z[:, :1], module.z[:, :1])
    assert choose_score(None, value, value, "regression").score == DEFAULT["regression"][0]
    nothing = Features(None, module.z[:, :1], module.z[:, :1])
    assert choose_score(None, nothing, nothing, "regression").score is None


def frozen(folder: Path) -> dict[str, Any]:
    return {
        "model": frozen_model(folder / "model.onnx", "classification"),
        "data": data(folder / "data.parquet", "classification", 2000, 0),
    }


def columns() -> Columns:
    return Columns(target="target", id="id", classes=CLASSES)


def test_conformal_and_test_rows_have_no_part_in_the_choice(tmp_path: Path) -> None:

    material = prepare(
        **frozen(tmp_path),
        options=FitOptions(task="classification"),
        columns=columns(),
        cache_dir=tmp_path / "cache",
    )
    options = FitOptions(task="classification", method="none", max_error=None)
    fitted, _, roles = fit_material(material, options)
    y = np.array(material.cache.y)
    other = material.usable[roles >= 2]
    y[other] = (y[other] + 1) % 3
    moved = dataclasses.replace(material, cache=dataclasses.replace(material.cache, y=y))
    again, _, _ = fit_material(moved, options)
    assert fitted.ood is not None and again.ood is not None
    assert fitted.ood.tried and fitted.ood.tried == again.ood.tried


def test_a_corrupted_copy_is_of_no_row_that_a_score_was_fitted_on(tmp_path: Path) -> None:

    given = frozen(tmp_path)
    material = prepare(
        **given,
        options=FitOptions(task="classification"),
        columns=columns(),
        cache_dir=tmp_path / "cache",
    )
    found, run = corrupted_sets(material, given["data"], ("noise",))
    assert run == len(found[0].rows) == 1000
    roles = split(material, 0)
    strange = dataclasses.replace(material, strange=tuple(found))
    kind, rows = parts_of(strange, roles)[0].strange["noise 3"]
    mine = np.isin(found[0].source, material.usable[roles == 1])
    assert kind == CORRUPTED and len(rows) == mine.sum() > 100
    np.testing.assert_array_equal(rows.z, found[0].rows.z[mine])
    clean = material.features(found[0].source)
    assert np.abs(found[0].rows.z - clean.z).max() > 0.1


def test_a_bundle_tells_what_was_tried(tmp_path: Path) -> None:
    names = COLUMNS["classification"]
    far = np.random.default_rng(0).normal(5, 1, size=(200, len(names))).astype("f4")
    pq.write_table(pa.table(dict(zip(names, far.T, strict=True))), tmp_path / "far.parquet")
    asked = {
        **frozen(tmp_path),
        "task": "classification",
        "target": "target",
        "id": "id",
        "classes": list(CLASSES),
        "method": "none",
    }
    source = {"cache_dir": tmp_path / "cache", "ood_data": {"far": tmp_path / "far.parquet"}}
    bundle = hedged.fit(out=tmp_path / "bundle", source={**source, "corrupt": True}, **asked)
    record = load_bundle(tmp_path / "bundle").manifest.ood
    assert record == bundle.manifest.ood and record is not None
    assert record.score.name in record.tried
    assert {"far", HELD_OUT, CORRUPTED} == set(record.tried[record.score.name])
    with pytest.raises(FitError, match="go with --ood auto"):
        hedged.fit(out=tmp_path / "b", source=source, **asked, ood="gen")
    empty = pa.table({n: pa.array([None] * 3, pa.float32()) for n in names})
    pq.write_table(empty, tmp_path / "far.parquet")
    with pytest.raises(DataError, match="every row is faulty"):
        hedged.fit(out=tmp_path / "b", source=source, **asked)
