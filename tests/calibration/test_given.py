"""Bundles whose classes or groups have thresholds of their own, from the table to the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibration.bundle import threshold_at
from calibration.conformal.randomise import uniforms
from calibration.evaluate import evaluate
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.metrics.coverage import coverage_band
from calibration.predictor import Predictor
from calibration.report import render
from posthoc.contract import DataError, FitError, Task
from posthoc.data import open_table, to_rows
from service.friendly import read_predict
from service.models import load_model
from service.scoring import score
from service.settings import Settings
from tests.factory import CLASSES, COLUMNS, frozen_model, rows, tiny_bundle
from tests.service.conftest import Server
from tests.service.streams import Exposition

REGIONS = ("east", "north", "south")


def regions(n: int) -> np.ndarray:
    """Two large groups and one of a few rows."""
    at = np.arange(n)
    return np.where(at % 199 == 0, "south", np.where(at % 3 == 0, "north", "east"))


def table(path: Path, task: Task, n: int, seed: int) -> Path:
    """Rows whose labels are worse in the north."""
    x, y = rows(task, n, seed)
    rng = np.random.default_rng(seed + 100)
    region = regions(n)
    north = region == "north"
    if task == "classification":
        y = np.where(north & (rng.random(n) < 0.3), rng.integers(0, 3, n), y)
    else:
        y = y + north * rng.normal(size=n) * 2
    columns: dict[str, Any] = {c: x[:, i] for i, c in enumerate(COLUMNS[task])}
    target = pa.array(np.asarray(CLASSES)[y]) if task == "classification" else pa.array(y)
    ids = [f"r{seed}-{i}" for i in range(n)]
    pq.write_table(pa.table({**columns, "region": region, "id": ids, "target": target}), path)
    return path


def grouped(folder: Path, task: Task) -> Path:
    fit(
        frozen_model(folder / "model.onnx", task),
        table(folder / "data.parquet", task, 4000, 1),
        folder / "bundle",
        FitOptions(task=task, given="group", method="none", alphas=(0.1, 0.2)),
        name="tiny",
        columns=Columns(
            target="target",
            inputs={"x": COLUMNS[task]},
            id="id",
            group="region",
            classes=CLASSES if task == "classification" else None,
        ),
        cache_dir=folder / "cache",
    )
    return folder / "bundle"


@pytest.fixture(scope="module")
def by_region(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped(tmp_path_factory.mktemp("given"), "classification")


@pytest.fixture(scope="module")
def intervals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped(tmp_path_factory.mktemp("given"), "regression")


def test_a_group_has_the_rank_of_its_own_rows(by_region: Path) -> None:
    predictor = Predictor(by_region)
    manifest = predictor.manifest
    assert [s.name for s in manifest.optional_inputs] == ["group"]
    first = manifest.conformal.guarantees[0]
    assert [c.name for c in first.cells] == list(REGIONS)
    assert sum(c.n for c in first.cells) == first.n
    assert first.cells[2].n < first.n_needed == 9 and first.cells[2].threshold is None
    q = predictor.q_hat(0.1)
    assert isinstance(q, np.ndarray) and np.isinf(q[2])
    assert q[1] > q[3] > q[0]  # the north is harder than all rows together
    assert q[3] == threshold_at(predictor.bundle.conformal_scores["set"], 0.1) == first.threshold
    assert manifest.evaluation["levels"]["0.9"]["least_covered"] > 0.8


def test_rows_of_several_groups_and_levels_share_a_batch(by_region: Path) -> None:
    predictor = Predictor(by_region)
    x, _ = rows("classification", 60, 5)
    group = np.arange(60) % 5 - 1  # one group that nobody knows (3), and none (-1)
    q = predictor.q_hat(0.1)
    assert isinstance(q, np.ndarray)
    got = predictor.run({"x": x, "group": group})
    for code in range(-1, 4):
        here = group == code
        mine = q[code if 0 <= code < 3 else 3]
        alone = predictor.run({"x": x}, q_hat=np.full((60, 4), mine))
        for name in ("set", "set_size"):
            np.testing.assert_array_equal(got[name][here], alone[name][here])
    assert got["set"][group == 2].all()  # too few rows: the full set
    levels = np.stack([predictor.q_hat(0.1 if i % 2 else 0.33) for i in range(60)])
    both = predictor.run({"x": x, "group": group}, q_hat=levels)
    for alpha, part in ((0.33, slice(0, None, 2)), (0.1, slice(1, None, 2))):
        alone = predictor.run({"x": x, "group": group}, q_hat=predictor.q_hat(alpha))
        np.testing.assert_array_equal(both["set"][part], alone["set"][part])


def test_each_group_is_covered(by_region: Path, tmp_path: Path) -> None:
    predictor = Predictor(by_region)
    x, y = rows("classification", 6000, 9)
    region = regions(6000)
    fresh = pq.read_table(table(tmp_path / "fresh.parquet", "classification", 6000, 9))
    y = np.asarray([CLASSES.index(c) for c in fresh["target"].to_pylist()])
    sets = predictor.run({"x": x, "group": predictor.group_codes(region)})["set"]
    marginal = predictor.run({"x": x})["set"]
    inside, without = sets[np.arange(6000), y], marginal[np.arange(6000), y]
    for name in REGIONS:
        assert inside[region == name].mean() > 0.87
    assert without[region == "north"].mean() < 0.85


def test_the_service_takes_names_codes_or_nothing(by_region: Path, tmp_path: Path) -> None:
    predictor = Predictor(by_region)
    x, _ = rows("classification", 4, 6)
    named = ["north", "south", "nowhere", None]
    want = predictor.run({"x": x, "group": np.asarray([1, 2, -1, -1])})["set"]
    settings = Settings(bundles=by_region, data_dir=tmp_path)
    with Server(settings) as server:
        client = server.client
        said = [
            dict(zip(COLUMNS["classification"], r.tolist(), strict=True)) | {"region": g}
            for r, g in zip(x, named, strict=True)
        ]
        answer = client.post("/v1/predict", json={"rows": said, "id": "q"}).json()
        sets = [p["set"] for p in answer["predictions"]]
        assert sets == [[CLASSES[c] for c in np.flatnonzero(r)] for r in want]
        body = {
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": [4, 4], "data": x.ravel().tolist()},
                {"name": "group", "datatype": "INT64", "shape": [4], "data": [1, 2, 7, -1]},
            ],
            "outputs": [{"name": "set"}],
        }
        tensors = client.post("/v2/models/tiny/infer", json=body).json()["outputs"]
        np.testing.assert_array_equal(np.reshape(tensors[0]["data"], (4, 3)), want)
        body["inputs"] = body["inputs"][:1]
        bare = client.post("/v2/models/tiny/infer", json=body).json()["outputs"]
        plain = predictor.run({"x": x})["set"]
        np.testing.assert_array_equal(np.reshape(bare[0]["data"], (4, 3)), plain)
        wrong = client.post("/v1/predict", json={"rows": [{**said[0], "region": 1.5}]})
        assert wrong.status_code == 400 and "row 0, column 'region'" in wrong.text
        unknown = Exposition(client.get("/metrics").text).total("uq_unknown_groups_total")
    assert unknown == 2 + 2 + 4


def test_no_group_is_not_the_group_without_a_name(tmp_path: Path) -> None:
    """A column may hold empty texts: they are a group, and null is none."""
    source = table(tmp_path / "data.parquet", "classification", 1200, 1)
    named = pq.read_table(source)
    at = named.schema.get_field_index("region")
    texts = ["" if r == "east" else r for r in named["region"].to_pylist()]
    pq.write_table(named.set_column(at, "region", pa.array(texts)), source)
    bundle = fit(
        frozen_model(tmp_path / "model.onnx", "classification"),
        source,
        tmp_path / "bundle",
        FitOptions(task="classification", given="group", method="none"),
        columns=Columns(
            target="target",
            inputs={"x": COLUMNS["classification"]},
            id="id",
            group="region",
            classes=CLASSES,
        ),
        cache_dir=tmp_path / "cache",
    )
    assert bundle.manifest.conformal.guarantees[0].cells[0].name == ""
    model = load_model(tmp_path / "bundle", device="cpu", threads=1)
    row = dict.fromkeys(COLUMNS["classification"], 0.5)
    said = [row | {"region": "north"}, row | {"region": ""}, row | {"region": None}, row]
    assert read_predict({"rows": said}, model).inputs["group"].tolist() == [1, 0, -1, -1]


def test_batch_scoring_reads_the_column(by_region: Path, tmp_path: Path) -> None:
    source = table(tmp_path / "in.parquet", "classification", 300, 7)
    done = score(by_region, source, tmp_path / "out", batch_size=64, passthrough=["region"])
    assert done.notes == ()
    predictor = Predictor(by_region, threads=1)
    x, _ = rows("classification", 300, 7)
    codes = predictor.group_codes(regions(300))
    want = [
        predictor.run({"x": x[i : i + 64], "group": codes[i : i + 64]}) for i in range(0, 300, 64)
    ]
    got = pq.read_table(tmp_path / "out")["set_size"].to_numpy()
    np.testing.assert_array_equal(got, np.concatenate([w["set_size"] for w in want]))
    without = pq.read_table(source).drop_columns(["region"])
    pq.write_table(without, tmp_path / "plain.parquet")
    done = score(by_region, tmp_path / "plain.parquet", tmp_path / "plain", batch_size=64)
    assert len(done.notes) == 1 and "no column 'region'" in done.notes[0]
    plain = [predictor.run({"x": x[i : i + 64]})["set_size"] for i in range(0, 300, 64)]
    got = pq.read_table(tmp_path / "plain")["set_size"].to_numpy()
    np.testing.assert_array_equal(got, np.concatenate(plain))


def test_evaluation_uses_the_groups(by_region: Path, tmp_path: Path) -> None:
    fresh = table(tmp_path / "fresh.parquet", "classification", 1500, 11)
    found = evaluate(by_region, fresh)
    predictor = Predictor(by_region)
    x, _ = rows("classification", 1500, 11)
    y = [CLASSES.index(c) for c in pq.read_table(fresh)["target"].to_pylist()]
    sets = predictor.run({"x": x, "group": predictor.group_codes(regions(1500))})["set"]
    (level,) = [v for v in found.levels if v.alpha == 0.1]
    assert level.coverage == pytest.approx(sets[np.arange(1500), y].mean())
    assert not level.banded  # each group has a band of its own, and all together have none
    page = render(found)
    assert "no one band" in page and "no one band of luck holds" in page


def test_intervals_of_a_group_too_small_have_no_end(intervals: Path, tmp_path: Path) -> None:
    predictor = Predictor(intervals)
    x, _ = rows("regression", 4, 5)
    group = np.asarray([0, 1, 2, -1])
    out = predictor.run({"x": x, "group": group})
    q = predictor.q_hat(0.1)
    assert isinstance(q, np.ndarray)
    half = q[[0, 1, 2, 3]] * out["std"][:, 0]
    np.testing.assert_allclose(out["upper"][:, 0] - out["mean"][:, 0], half, rtol=1e-5)
    assert np.isneginf(out["lower"][2, 0]) and np.isfinite(out["lower"][[0, 1, 3]]).all()
    with Server(Settings(bundles=intervals, data_dir=tmp_path)) as server:
        body = {"inputs": {"x": x.tolist(), "group": group.tolist()}}
        made = server.client.post("/v1/predict", json=body).json()["predictions"]
    assert made[2]["upper"] is None and made[1]["upper"] == pytest.approx(out["upper"][1, 0])


def test_each_class_has_a_threshold(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "by-class", given="class", method="none", conformal="lac")
    predictor = Predictor(bundle)
    q = predictor.q_hat(0.25)
    assert isinstance(q, np.ndarray) and q.shape == (3,)
    x, y = rows("classification", 9000, 3)
    sets = predictor.run({"x": x}, q_hat=q)["set"]
    for c in range(3):
        assert sets[y == c, c].mean() == pytest.approx(0.75, abs=0.05)
    first = predictor.manifest.conformal.guarantees[0]
    assert [c.n for c in first.cells] == np.bincount(
        y_of(bundle, "conformal"), minlength=3
    ).tolist()


def y_of(bundle: Path, role: str) -> np.ndarray:
    """Labels of the rows of a role: their order in the table is that of reference.parquet."""
    seen = pq.read_table(bundle / "reference.parquet")["role"].to_pylist()
    _, y = rows("classification", 4000, 1)
    return y[np.asarray(seen) == role]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": "group"}, "--group"),
        ({"given": "class", "task": "regression"}, "classification"),
        ({"randomised": True, "task": "regression"}, "classification"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    task = options.pop("task", "classification")
    with pytest.raises(FitError, match=message):
        tiny_bundle(tmp_path / "b", task, **options)


def test_too_few_rows_for_any_level_are_said(by_region: Path) -> None:
    with pytest.raises(DataError, match="needs at least 9999 conformal rows"):
        Predictor(by_region).q_hat(0.0001)


@pytest.mark.parametrize("method", ["aps", "raps", "saps", "topk"])
def test_randomised_sets_are_smaller_and_the_rows_own(tmp_path: Path, method: str) -> None:
    bundle = tiny_bundle(tmp_path / "b", conformal=method, randomised=True, method="none")
    predictor = Predictor(bundle)
    assert [s.name for s in predictor.manifest.optional_inputs] == ["u"]
    x, y = rows("classification", 4000, 21)
    u = np.random.default_rng(0).uniform(size=4000).astype(np.float32)
    whole, part = predictor.run({"x": x})["set"], predictor.run({"x": x, "u": u})["set"]
    assert (whole >= part).all() and whole.sum() > part.sum()
    n = predictor.manifest.conformal.guarantees[0].n
    low, high = coverage_band(n, 4000, 0.1)
    assert low <= part[np.arange(4000), y].mean() <= high
    np.testing.assert_array_equal(part[5:9], predictor.run({"x": x[5:9], "u": u[5:9]})["set"])
    plain = tiny_bundle(tmp_path / "plain", conformal=method, method="none")
    assert Predictor(plain).manifest.optional_inputs == ()


def test_the_service_and_scoring_take_u(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", conformal="topk", randomised=True, method="none")
    predictor = Predictor(bundle, threads=1)
    x, _ = rows("classification", 50, 3)
    u = (np.arange(50) / 50).astype(np.float32)
    want = predictor.run({"x": x, "u": u})["set_size"].tolist()
    with Server(Settings(bundles=bundle, data_dir=tmp_path / "data")) as server:
        body = {"inputs": {"x": x.tolist(), "u": u.tolist()}, "outputs": ["set_size"]}
        made = server.client.post("/v1/predict", json=body).json()["predictions"]
        assert [p["set_size"] for p in made] == want
        bare = {"inputs": {"x": x.tolist()}, "outputs": ["set_size"]}
        made = server.client.post("/v1/predict", json=bare).json()["predictions"]
        assert [p["set_size"] for p in made] == predictor.run({"x": x})["set_size"].tolist()
        for outside in (1.5, -0.1):
            body["inputs"]["u"][7] = outside
            wrong = server.client.post("/v1/predict", json=body)
            assert wrong.status_code == 400 and "row 7 of input 'u' must lie" in wrong.text
    source = table(tmp_path / "in.parquet", "classification", 200, 7)
    score(bundle, source, tmp_path / "out", batch_size=200)
    rows_of = to_rows(
        next(iter(open_table(source).batches(200))),
        predictor.manifest.mapping.inputs_only(),
        predictor.inputs,
    )
    own = uniforms(rows_of.content_hashes).astype(np.float32)
    sets = predictor.run({"x": rows_of.inputs["x"], "u": own})["set_size"]
    np.testing.assert_array_equal(pq.read_table(tmp_path / "out")["set_size"].to_numpy(), sets)


def test_clusters_of_classes(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", given="cluster", method="none")
    predictor = Predictor(bundle)
    (first, _) = predictor.manifest.conformal.guarantees
    q = predictor.q_hat(0.1)
    assert isinstance(q, np.ndarray) and q.shape == (3,)
    assert set(q.tolist()) == {c.threshold for c in first.cells}
    assert sum(c.n for c in first.cells) == first.n
    with pytest.raises(FitError, match="lac has nothing to randomise"):
        tiny_bundle(tmp_path / "c", randomised=True)
