"""Options that do not go together are refused, and what was chosen is said in the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.bundle import load_bundle
from calibration.evaluate import evaluate
from calibration.fit import fit
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts, check_options
from calibration.fit_thresholds import Fitted, run_head
from calibration.head import reference
from calibration.material import Columns
from calibration.quality import Piece, summary
from posthoc.contract import DataError, Features, FitError, LinearHead, Task
from posthoc.rows import of
from tests import factory

C, D = 3, 6


def rows(task: Task, n: int, seed: int, *, moved: float = 0.0) -> tuple[LinearHead, Features]:
    """A head and rows; ``moved`` is how far the frozen head lies from the one of the labels."""
    weight = np.random.default_rng(0).normal(size=(C, D))
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(n, D)).astype(np.float32)
    truth = phi @ weight.T
    head = LinearHead(weight + moved * np.random.default_rng(1).normal(size=(C, D)), np.zeros(C))
    z = (phi @ head.weight.T).astype(np.float32)
    if task == "regression":
        return head, Features(phi, z, truth + rng.normal(size=truth.shape))
    return head, Features(phi, z, (truth + rng.gumbel(size=truth.shape)).argmax(1))


def fitted(task: Task = "classification", moved: float = 0.0, **options: Any) -> Fitted:
    head, module = rows(task, 300, 1, moved=moved)
    parts = Parts(module, *(rows(task, 300, s, moved=moved)[1] for s in (2, 3)))
    return fit_head(head, parts, FitOptions(task=task, ood="none", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "none", "predictive": "mc"}, "--predictive mc belongs to a module"),
        ({"method": "none", "draws": 8}, "--draws belongs to a module"),
        ({"method": "none", "prediction": "module"}, "--prediction module belongs to a module"),
        ({"method": "none", "settings": {"a": 1}}, "--set belongs to a module"),
        ({"prediction": "module"}, "keeps the frozen model's answer"),
        ({"task": "regression", "prediction": "module"}, "keeps the frozen model's answer"),
        ({"task": "regression", "draws": 8}, "--draws is for classification"),
        ({"task": "regression", "predictive": "mc"}, "is for classification"),
        ({"tolerance": 1.0}, "--tolerance is for regression"),
        ({"quantile_levels": (0.5,)}, "--quantiles are for regression"),
        ({"side": "upper"}, "--side and --recalibration are for regression"),
        ({"recalibration": "kde"}, "--side and --recalibration are for regression"),
        ({"conformal": "cqr"}, "unknown conformal method 'cqr' for classification"),
        ({"task": "regression", "conformal": "aps"}, "unknown conformal method 'aps'"),
        ({"task": "regression", "confidence": "beta"}, "are for classification"),
        ({"randomised": True, "conformal": "lac"}, "lac has nothing to randomise"),
        ({"task": "regression", "given": "cluster"}, "--given group is not"),
        ({"shift": "target", "given": "class"}, "--shift weighs all rows together"),
        ({"mask": 1, "conformal": "raps"}, "--mask is for a segmentation"),
        ({"alphas": (0.1, 1.0)}, "alpha must lie strictly between 0 and 1"),
        ({"task": "regression", "quantile_levels": (0.5, 0.1)}, "rise strictly"),
        ({"alphas": (0.1, 0.1)}, "the same alpha is named twice"),
        ({"ood": "gen+gen"}, "the same OOD score is named twice"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        check_options(FitOptions(**{"task": "classification", **options}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "loss", "predictive": "mc"}, "no draws to average"),
        ({"method": "loss", "predictive": "bridge"}, "no variance of single classes"),
        ({"method": "loss", "draws": 8}, "draws of its own or none"),
        ({"method": "bootstrap", "prediction": "module", "predictive": "mc"}, "is a mixture"),
        ({"method": "bootstrap", "prediction": "module", "draws": 8}, "draws of its own"),
    ],
)
def test_what_only_the_module_can_tell(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        fitted(**options)


def test_a_mixture_is_a_mean_over_its_members() -> None:
    assert fitted(method="bootstrap", prediction="module").head.predictive == "mc"


def test_a_model_without_error_is_refused() -> None:
    """Targets that are the float32 outputs themselves, up to rounding."""
    head, module = rows("regression", 200, 1)
    exact = Features(module.phi, module.z, module.phi.astype(np.float64) @ head.weight.T)
    with pytest.raises(FitError, match="without error"):
        fit_head(head, Parts(exact, exact, exact), FitOptions(task="regression", method="none"))


def test_a_saturated_class_keeps_its_score_where_the_label_is_another() -> None:
    """The frozen label under a link that moves the argmax: 1 - p of the sure class is not zero."""
    done = fitted(moved=1.5, method="bootstrap", prediction="module")
    _, test = rows("classification", 400, 4, moved=1.5)
    head = done.head.with_(prediction="frozen", strength=100.0, temperature=0.1)
    want = reference(head, test.phi, test.z)
    score, found = want["set_scores"], run_head(head, test)["set_scores"]
    other = want["probs"].argmax(1) != want["label"]
    small = other[:, None] & (score > 1e-20) & (score < 1e-8)
    assert small.any()
    np.testing.assert_allclose(found[small], score[small], rtol=1e-2)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_frozen_figures_are_the_frozen_models(task: Task) -> None:
    """A module that mends a bad head: its answers are not counted as those of the frozen model."""
    done = fitted(task, moved=1.5, method="vbll", prediction="module")
    _, test = rows(task, 1000, 4, moved=1.5)
    found = summary(done, [Piece(of(test).blocks)])
    if task == "regression":
        assert found["frozen"]["rmse"] == pytest.approx(np.sqrt(((test.y - test.z) ** 2).mean()))
        assert found["hedged"]["rmse"] < found["frozen"]["rmse"] - 0.3
    else:
        assert found["frozen"]["accuracy"] == pytest.approx((test.z.argmax(1) == test.y).mean())
        assert found["hedged"]["accuracy"] > found["frozen"]["accuracy"] + 0.05


def test_a_bundle_says_whose_answer_it_serves(tmp_path: Path) -> None:
    own = factory.tiny_bundle(tmp_path / "own", method="vbll", prediction="module")
    manifest = load_bundle(own).manifest
    assert manifest.prediction == "module" and manifest.scaling["strength"] > 0
    assert any("is that of vbll" in note for note in manifest.notes)
    found = evaluate(own, tmp_path / "own.parquet")
    assert found.about["answer"] == "the module's"


def test_a_module_without_strength_is_said(tmp_path: Path) -> None:
    path = factory.tiny_bundle(tmp_path / "b", method="vbll_generative", prediction="module")
    manifest = load_bundle(path).manifest
    assert manifest.scaling["strength"] == 0
    assert any("vbll_generative no strength" in note for note in manifest.notes)


def test_an_import_takes_the_place_of_a_method(tmp_path: Path) -> None:
    for options in ({"method": "none"}, {"settings": {"train_rows": 5}}):
        with pytest.raises(FitError, match="in place of --method"):
            fit(
                "m.onnx", "d.parquet", tmp_path / "b",
                FitOptions(task="classification", **options), laplace="x.pt",
            )  # fmt: skip


def test_class_names_of_a_regression_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this is a regression"):
        fit(
            factory.frozen_model(tmp_path / "m.onnx", "regression"),
            factory.data(tmp_path / "d.parquet", "regression", n=100),
            tmp_path / "b",
            FitOptions(task="regression"),
            columns=Columns(target="target", classes=("a",)),
        )
