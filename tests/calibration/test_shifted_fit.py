"""Bundles whose thresholds are weighted for production rows, from the table to the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibration.evaluate import evaluate
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.predictor import Predictor
from calibration.shift.weighted import Weighted, threshold
from posthoc.contract import FitError, Task
from service.scoring import score
from service.settings import Settings
from tests.factory import CLASSES, COLUMNS, data, frozen_model, rows, weights
from tests.service.conftest import Server

ALPHA = 0.2


def tilted(task: Task, n: int, seed: int, by: str) -> tuple[np.ndarray, np.ndarray]:
    """n rows, drawn again from many: one class four times as often or the target upwards
    (``target``), or the first input to where the noise is (``covariate``)."""
    x, y = rows(task, 8 * n, seed)
    y = noisy(task, x, y, seed)
    weight = np.exp(x[:, 0]) if by == "covariate" else np.exp(0.7 * np.clip(y, -3, 3))
    if by == "target" and task == "classification":
        weight = np.where(y == 1, 4.0, 1.0)
    kept = np.random.default_rng(seed).choice(8 * n, n, p=weight / weight.sum())
    return x[kept], y[kept]


def noisy(task: Task, x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Labels that are worse where the first input is large."""
    rng = np.random.default_rng(seed + 500)
    if task == "regression":
        return y + np.exp(x[:, 0] / 2 - 0.7) * rng.normal(size=len(y))
    return np.where(rng.random(len(y)) < 1 / (1 + np.exp(1 - 2 * x[:, 0])), y[::-1], y)


def write(path: Path, task: Task, x: np.ndarray, y: np.ndarray | None) -> Path:
    columns: dict[str, Any] = {c: x[:, i] for i, c in enumerate(COLUMNS[task])}
    if y is not None:
        columns["target"] = np.asarray(CLASSES)[y] if task == "classification" else y
    pq.write_table(pa.table(columns), path)
    return path


def shifted(folder: Path, task: Task, by: str, **options: Any) -> Path:
    x, y = rows(task, 6000, 1)
    fit(
        frozen_model(folder / "model.onnx", task),
        write(folder / "data.parquet", task, x, noisy(task, x, y, 1)),
        folder / "bundle",
        FitOptions(task=task, shift=by, method="none", alphas=(ALPHA, 0.1), **options),
        name="tiny",
        production=write(folder / "production.parquet", task, tilted(task, 3000, 2, by)[0], None),
        columns=Columns(
            target="target",
            inputs={"x": COLUMNS[task]},
            classes=CLASSES if task == "classification" else None,
        ),
        cache_dir=folder / "cache",
    )
    return folder / "bundle"


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shifted(tmp_path_factory.mktemp("shift"), "classification", "target")


@pytest.fixture(scope="module")
def covariates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shifted(tmp_path_factory.mktemp("shift"), "classification", "covariate")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shifted(tmp_path_factory.mktemp("shift"), "regression", "target")


def covered(predictor: Predictor, x: np.ndarray, y: np.ndarray, **run: Any) -> float:
    out = predictor.run({"x": x}, **run)
    if predictor.manifest.task == "classification":
        return float(out["set"][np.arange(len(y)), y].mean())
    return float(((out["lower"][:, 0] <= y) & (y <= out["upper"][:, 0])).mean())


@pytest.mark.parametrize("by", ["target", "covariate"])
def test_production_rows_are_covered(by: str, request: pytest.FixtureRequest) -> None:
    predictor = Predictor(request.getfixturevalue("classes" if by == "target" else "covariates"))
    x, y = tilted("classification", 6000, 9, by)
    scores = predictor.bundle.conformal_scores["set"].astype(float)
    marginal = np.quantile(scores, 1 - ALPHA, method="higher")
    p = predictor.run({"x": x})["probs"].astype(float)
    without = float((1 - p[np.arange(len(y)), y] <= marginal).mean())
    found = covered(predictor, x, y)
    assert found > 1 - ALPHA - 0.045  # of which 0.03 are the luck of some 700 effective rows
    assert abs(found - (1 - ALPHA)) < abs(without - (1 - ALPHA))


def test_what_the_manifest_says(classes: Path, covariates: Path, targets: Path) -> None:
    for path, by in ((classes, "target"), (covariates, "covariate"), (targets, "target")):
        m = Predictor(path).manifest
        assert m.conformal.shift == by
        assert 50 < m.conformal.weights["effective_rows"] < m.conformal.guarantees[0].n
        assert m.conformal.weights["production_rows"] == 3000
        assert all(g.threshold is None for g in m.conformal.guarantees)
    levels = Predictor(classes).manifest.evaluation["levels"]["0.8"]
    assert levels["coverage_in_production"] == pytest.approx(1 - ALPHA, abs=0.05)


def test_class_thresholds_are_weighted_quantiles(classes: Path) -> None:
    predictor = Predictor(classes)
    kept = predictor.bundle.conformal_scores
    q = predictor.q_hat(ALPHA)
    assert isinstance(q, np.ndarray) and q.shape == (3,)
    for c in range(3):
        of, own = kept["shift_weights"], kept["shift_own"]
        assert q[c] == threshold(kept["set"], of, ALPHA, own[c])
    # The class that comes four times as often weighs more, and it alone.
    assert own[1] > 2 * max(own[0], own[2])
    x, _ = rows("classification", 50, 3)
    levels = np.stack([np.asarray(predictor.q_hat(0.1 if i % 2 else 0.33)) for i in range(50)])
    both = predictor.run({"x": x}, q_hat=levels)["set"]
    for alpha, part in ((0.33, slice(0, None, 2)), (0.1, slice(1, None, 2))):
        alone = predictor.run({"x": x}, q_hat=predictor.q_hat(alpha))["set"]
        np.testing.assert_array_equal(both[part], alone[part])


def test_a_row_has_its_own_threshold(covariates: Path) -> None:
    predictor = Predictor(covariates)
    x, _ = rows("classification", 400, 5)
    out = predictor.run({"x": x}, q_hat=predictor.q_hat(0.1))
    cells, logits = predictor.cells, predictor.manifest.frozen.logits
    assert isinstance(cells, Weighted) and logits is not None
    z = predictor.run({"x": x}, outputs=[logits])[logits]
    t = weights("classification")
    q = cells.of_rows(0.9, z, np.tanh(x @ t["w1"] + t["b1"]))
    assert len(np.unique(q)) >= 3
    sets = 1 - out["probs"].astype(float) <= q[:, None]
    same = (sets == out["set"]).all(1)
    assert same.mean() > 0.97 and (out["set"] | ~sets)[~same].all()  # a rank more, never less
    levels = np.where(np.arange(400) % 2 == 0, 0.1, 0.3)
    mixed = predictor.run({"x": x}, q_hat=np.stack([predictor.q_hat(a) for a in levels]))["set"]
    for alpha in (0.1, 0.3):
        alone = predictor.run({"x": x}, q_hat=predictor.q_hat(alpha))["set"]
        np.testing.assert_array_equal(mixed[levels == alpha], alone[levels == alpha])


def test_intervals_cover_targets_that_moved(targets: Path) -> None:
    predictor = Predictor(targets)
    x, y = tilted("regression", 6000, 9, "target")
    r = np.abs(y - predictor.run({"x": x})["mean"][:, 0]) / predictor.run({"x": x})["std"][:, 0]
    scores = predictor.bundle.conformal_scores["interval"].astype(float)
    without = float((r <= np.quantile(scores, 1 - ALPHA, method="higher")).mean())
    found = covered(predictor, x, y)
    assert found > 1 - ALPHA - 0.025
    assert abs(found - (1 - ALPHA)) < abs(without - (1 - ALPHA))


def test_intervals_under_moved_inputs(tmp_path: Path) -> None:
    predictor = Predictor(shifted(tmp_path, "regression", "covariate"))
    x, y = tilted("regression", 6000, 9, "covariate")
    assert covered(predictor, x, y) > 1 - ALPHA - 0.1
    assert np.isfinite(predictor.run({"x": x})["upper"]).any()


def test_such_bundles_are_served_scored_and_evaluated(
    classes: Path, covariates: Path, targets: Path, tmp_path: Path
) -> None:
    for path in (classes, covariates, targets):
        predictor = Predictor(path, threads=1)
        task = predictor.manifest.task
        field = "set" if task == "classification" else "upper"
        x, y = rows(task, 300, 12)
        fresh = write(tmp_path / "fresh.parquet", task, x, y)
        found = evaluate(path, fresh)
        want = predictor.run({"x": x}, q_hat=predictor.q_hat(0.1))
        if task == "classification":
            inside = want["set"][np.arange(300), y]
            assert found.levels[1].coverage == pytest.approx(inside.mean(), abs=0.01)
        out = tmp_path / f"out-{path.parent.name}"
        score(path, fresh, out, batch_size=300)
        column = "set_size" if field == "set" else "upper"
        np.testing.assert_array_equal(
            np.ravel(pq.read_table(out)[column].to_numpy()),
            np.ravel(predictor.run({"x": x})[column]),
        )
        with Server(Settings(bundles=path, data_dir=tmp_path / path.parent.name)) as server:
            body = {"inputs": {"x": x[:7].tolist()}, "alpha": 0.1, "outputs": [field]}
            made = server.client.post("/v1/predict", json=body).json()["predictions"]
        want = predictor.run({"x": x[:7]}, q_hat=predictor.q_hat(0.1))[field]
        if field == "set":
            assert [p["set"] for p in made] == [
                [CLASSES[c] for c in np.flatnonzero(row)] for row in want
            ]
        else:
            np.testing.assert_allclose([p["upper"] for p in made], want[:, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"shift": "target"}, {}, "--production FILE go together"),
        ({}, {"production": "rows"}, "--production FILE go together"),
        ({"shift": "target", "given": "class"}, {"production": "rows"}, "leave --given"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, options: dict[str, Any], given: dict[str, str], message: str
) -> None:
    table = data(tmp_path / "data.parquet", n=400)
    with pytest.raises(FitError, match=message):
        fit(
            frozen_model(tmp_path / "model.onnx"),
            table,
            tmp_path / "bundle",
            FitOptions(task="classification", method="none", **options),
            columns=Columns(target="target", inputs={"x": COLUMNS["classification"]}),
            cache_dir=tmp_path / "cache",
            **dict.fromkeys(given, table),
        )
    assert not (tmp_path / "bundle").exists()


def test_rows_too_unlike_are_refused(tmp_path: Path) -> None:
    x, y = rows("classification", 2000, 1)
    far = write(tmp_path / "far.parquet", "classification", x[:500] + 25, None)
    with pytest.raises(FitError, match=r"labelled rows stand for 0\.\d+ of"):
        fit(
            frozen_model(tmp_path / "model.onnx"),
            write(tmp_path / "data.parquet", "classification", x, y),
            tmp_path / "bundle",
            FitOptions(task="classification", method="none", shift="covariate"),
            production=far,
            columns=Columns(
                target="target", inputs={"x": COLUMNS["classification"]}, classes=CLASSES
            ),
            cache_dir=tmp_path / "cache",
        )
