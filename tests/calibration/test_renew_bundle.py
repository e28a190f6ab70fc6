"""What a renewed bundle says of itself, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from calibration.bundle import (
    MANIFEST,
    REFERENCE,
    STATE,
    conformal_rank,
    load_bundle,
    parse_manifest,
)
from calibration.evaluate import evaluate
from calibration.predictor import Predictor
from calibration.renew.factor import tempered_probs
from calibration.renew.reference import ROLE
from calibration.renew.rows import Labelled, divided, drawn
from calibration.renew.write import next_version, version_at, write_renewed
from posthoc.contract import BundleError, DataError, FitError, Task
from tests.calibration.renewals import (
    bundles,
    covered,
    in_band,
    moved,
    renewed,
)
from tests.factory import data, rows, tiny_bundle

__all__ = ["bundles"]

# What a renewed bundle says


def test_the_manifest_says_where_it_came_from(bundles: dict[Task, Path], tmp_path: Path) -> None:
    old = load_bundle(bundles["classification"])
    found = renewed(old.path, moved(old.path, "classification", 5.0), seed=4)
    new = write_renewed(found, tmp_path / "new", "7")
    m, record = new.manifest, new.manifest.renewal
    assert record is not None
    assert (m.name, m.version) == ("tiny", "7")
    assert (record.identity, record.version) == (old.identity, "1")
    assert record.since.startswith("2023-11-14T") and record.until > record.since
    assert (record.served, record.labelled, record.seed) == (8000, 4000, 4)
    assert record.rows == found.parts and sum(record.rows.values()) == 4000
    assert record.factor == found.factor.value  # type: ignore[union-attr]
    assert record.before["means"]["nll"] > record.after["means"]["nll"]
    assert record.after["levels"][0]["inside"] and not record.before["levels"][0]["inside"]
    assert any("laplace" in k for k in record.kept)
    notes = [n for n in m.notes if n.startswith("Renewed")]
    assert any("exchangeable" in n for n in notes)
    assert [n for n in m.notes if n not in notes] == list(old.manifest.notes)
    assert (m.module, m.mapping, m.splits, m.ood) == tuple(
        getattr(old.manifest, k) for k in ("module", "mapping", "splits", "ood")
    )
    # A reader of before does not know the field, and reads the rest.
    text = json.loads((new.path / MANIFEST).read_text())
    text["renewal"]["later"] = 1
    assert parse_manifest(json.dumps(text).encode(), new.path).renewal == record
    module = {k: v for k, v in old.tensors(STATE).items() if k.startswith(("module/", "ood/"))}
    for name, value in module.items():
        np.testing.assert_array_equal(new.tensors(STATE)[name], value)


def test_the_reference_distributions_are_those_of_the_renewal(
    bundles: dict[Task, Path], tmp_path: Path
) -> None:
    old = load_bundle(bundles["classification"])
    found = renewed(old.path, moved(old.path, "classification", 5.0))
    new = write_renewed(found, tmp_path / "new", "2")
    before, after = (pq.read_table(io.BytesIO(b.files[REFERENCE])) for b in (old, new))
    role = np.asarray(after["role"].to_pylist())
    own = role == ROLE
    assert own.sum() == found.parts["conformal"]
    assert after["row_hash"].to_pylist()[: len(before)] == before["row_hash"].to_pylist()
    sure = after["confidence"].to_numpy()
    assert np.isnan(sure[~own]).all()
    np.testing.assert_allclose(np.sort(sure[own]), np.sort(found.conformal.confidence), rtol=1e-6)
    np.testing.assert_array_equal(
        after["ood_score"].to_numpy()[~own], before["ood_score"].to_numpy()
    )
    x, _ = rows("classification", 2000, 50)
    served_now = Predictor(new).run({"x": x})
    assert after["set_size"].to_numpy()[own].mean() == pytest.approx(
        served_now["set_size"].mean(), abs=0.06
    )
    assert np.nanmean(after["entropy"].to_numpy()) == pytest.approx(
        float(served_now["entropy"].mean()), abs=0.02
    )
    # Rows that the fit saw are still told apart.
    report = evaluate(new, data(tmp_path / "seen.parquet", n=4000, seed=1))
    assert report.n == old.manifest.splits.rows["test"]


def test_a_renewed_bundle_is_renewed_again(bundles: dict[Task, Path], tmp_path: Path) -> None:
    task: Task = "classification"
    first = write_renewed(
        renewed(bundles[task], moved(bundles[task], task, 5.0)), tmp_path / "2", "2"
    )
    found = renewed(first.path, moved(first.path, task, 1.0, seed=300))
    second = write_renewed(found, tmp_path / "3", "3")
    assert second.manifest.renewal is not None
    assert second.manifest.renewal.identity == first.identity
    assert in_band(second, covered(second.path, task, 1.0))
    role = pq.read_table(io.BytesIO(second.files[REFERENCE]))["role"].to_pylist()
    assert role.count(ROLE) == found.parts["conformal"]
    notes = [n for n in second.manifest.notes if "labelled predictions, of" in n]
    assert len(notes) == 1


# Refusals


def test_too_few_rows_say_how_many_it_takes(bundles: dict[Task, Path]) -> None:
    fresh = moved(bundles["classification"], "classification", 5.0, n=150)
    with pytest.raises(
        DataError, match=r"scaling takes 100 rows and has .*about 400 and there are"
    ):
        renewed(bundles["classification"], fresh)
    with pytest.raises(DataError, match=r"there are 0: take a longer --since"):
        renewed(bundles["classification"], fresh.take(np.zeros(0, np.int64)))
    with pytest.raises(DataError, match=r"coverage 0\.95 takes 19 rows"):
        renewed(bundles["regression"], moved(bundles["regression"], "regression", 0.6, n=20))


def test_ets_is_refused_and_its_thresholds_are_not(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", method="none", scaling="ets")
    fresh = moved(bundle, "classification", 5.0)
    with pytest.raises(FitError, match=r"the scaling is ets.*--only conformal, or fit again"):
        renewed(bundle, fresh)
    new = write_renewed(renewed(bundle, fresh, only="conformal"), tmp_path / "new", "2")
    assert in_band(new, covered(new.path, "classification", 5.0))


def test_predictions_without_probabilities_are_refused(bundles: dict[Task, Path]) -> None:
    fresh = moved(bundles["classification"], "classification", 5.0)
    with pytest.raises(DataError, match="keeps no probabilities of so many classes"):
        renewed(bundles["classification"], dataclasses.replace(fresh, probs=None))
    with pytest.raises(DataError, match="--tolerance is for regression"):
        renewed(bundles["classification"], fresh, tolerance=1.0)
    one = dataclasses.replace(fresh, y=np.zeros(len(fresh), np.int64))
    with pytest.raises(FitError, match="at least two classes"):
        renewed(bundles["classification"], one)


def test_a_bundle_is_never_overwritten(bundles: dict[Task, Path]) -> None:
    bundle = bundles["classification"]
    found = renewed(bundle, moved(bundle, "classification", 5.0))
    with pytest.raises(BundleError, match="exists already"):
        write_renewed(found, bundle, "2")


@pytest.mark.parametrize(
    ("version", "after"), [("1", "2"), ("9", "10"), ("v1.9-rc", "v1.10-rc"), ("blue", "blue.2")]
)
def test_versions_go_on(version: str, after: str) -> None:
    assert next_version(version) == after


def test_the_version_is_that_of_its_place(bundles: dict[Task, Path], tmp_path: Path) -> None:
    bundle = load_bundle(bundles["classification"])
    assert version_at(tmp_path / "new", bundle, None) == "2"
    assert version_at(tmp_path / "tiny" / "5", bundle, None) == "5"
    assert version_at(tmp_path / "tiny" / "5", bundle, "6") == "6"
    with pytest.raises(BundleError, match="version '1' of tiny is the bundle that is renewed"):
        version_at(tmp_path / "new", bundle, "1")


def test_u_is_uniform_and_tells_nothing_of_the_part() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 40_000).astype(np.uint64)
    none = np.zeros(len(keys))
    fresh = Labelled(keys, none, none)
    parts = divided(fresh, {"a": 0.5, "b": 0.5}, 0)
    for part in parts.values():
        u = drawn(part, 0)
        assert abs(u.mean() - 0.5) < 0.01 and u.min() >= 0 and u.max() < 1


def test_a_factor_of_one_is_no_change() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(4), 50).astype(np.float32)
    np.testing.assert_array_equal(tempered_probs(p, 1.0), p)
    np.testing.assert_allclose(tempered_probs(p, 1.0 + 1e-9), p, rtol=1e-6)
    assert conformal_rank(9, 0.1) == 9
