"""A family behind the temperature in a whole fit: label, sets and manifest stay what they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.bundle import load_bundle
from calibration.compile import check_head, compile_head
from calibration.fit import fit_material
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts
from calibration.fit_thresholds import run_head
from calibration.head import right_or_wrong
from calibration.material import Material
from calibration.metrics.coverage import coverage_band
from calibration.predictor import Predictor
from posthoc.contract import FitError
from posthoc.links import softmax
from tests.calibration import heads
from tests.calibration.heads import linear
from tests.factory import rows, tiny_bundle


@pytest.mark.parametrize("scaling", ["ets", "svs", "sms", "auto"])
@pytest.mark.parametrize("method", ["none", "laplace"])
def test_the_label_stays_and_sets_cover(pool: Material, scaling: Any, method: str) -> None:
    options = FitOptions(task="classification", method=method, scaling=scaling)
    done, test, _ = fit_material(pool, options)
    out = run_head(done.head, test)
    np.testing.assert_array_equal(out["label"], test.z.argmax(1))
    assert test.y is not None
    at = np.arange(len(test))
    np.testing.assert_array_equal(out["confidence"], out["probs"][at, out["label"]])
    np.testing.assert_allclose(out["probs"].sum(1), 1, atol=1e-5)
    for g in done.conformal.guarantees:
        low, high = coverage_band(g.n, len(test), g.alpha)
        covered = (out["set_scores"][at, test.y] <= g.threshold).mean()
        assert low <= covered <= high
    if method == "laplace":
        assert (out["epistemic"] >= 0).all() and out["epistemic"].max() > 0
    plain, _, _ = fit_material(pool, FitOptions(task="classification", method=method))
    before = run_head(plain.head, test)["probs"][at, test.y]
    # Asked for by name, a family may cost what its parameters cost; chosen, hardly anything.
    lost = np.log(before).mean() - np.log(out["probs"][at, test.y]).mean()
    assert lost < (0.002 if scaling == "auto" else 0.03)


def test_none_is_the_frozen_model(pool: Material) -> None:
    options = FitOptions(task="classification", method="none", scaling="none")
    done, test, _ = fit_material(pool, options)
    np.testing.assert_allclose(run_head(done.head, test)["probs"], softmax(test.z), atol=1e-6)
    with pytest.raises(FitError, match="goes with --method none"):
        fit_material(pool, FitOptions(task="classification", scaling="none"))


@pytest.mark.parametrize("confidence", ["beta", "isotonic"])
def test_confidence_of_its_own(pool: Material, confidence: Any) -> None:
    options = FitOptions(task="classification", method="none", confidence=confidence)
    done, test, _ = fit_material(pool, options)
    plain, _, _ = fit_material(pool, FitOptions(task="classification", method="none"))
    out, before = run_head(done.head, test), run_head(plain.head, test)
    np.testing.assert_array_equal(out["probs"], before["probs"])
    order = np.argsort(before["confidence"], kind="stable")
    assert (np.diff(out["confidence"][order]) >= -1e-5).all()
    right = (out["label"] == test.y).mean()
    assert abs(out["confidence"].mean() - right) < 0.03
    both = np.exp(right_or_wrong(before["probs"], before["label"]))
    np.testing.assert_allclose(both.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("scaling", ["ets", "sms"])
@pytest.mark.parametrize("predictive", ["probit", "probit_class", "mc", "bridge"])
def test_the_label_stays_under_every_link(predictive: Any, scaling: Any) -> None:
    """Confidence, entropy and decomposition are in their bounds; the graph is the definition."""
    head = linear(3)
    module, calibration, conformal, test = (
        heads.rows(head, "classification", 300, i) for i in range(4)
    )
    options = FitOptions(
        task="classification", scaling=scaling, predictive=predictive, ood="none", confidence="beta"
    )
    done = fit_head(head, Parts(module, calibration, conformal), options)
    strong = done.head.with_(strength=1.0)  # the bridge's own may be nought
    assert strong.family is not None and strong.sureness is not None
    out = run_head(strong, test)
    np.testing.assert_array_equal(out["label"], test.z.argmax(1))
    assert ((out["confidence"] > 0) & (out["confidence"] <= 1)).all()
    for name in ("entropy", "aleatoric", "epistemic"):
        assert ((out[name] >= 0) & (out[name] < np.log(3) + 1e-5)).all()
    check_head(strong, compile_head(strong), test.phi, test.z)


def test_the_module_names_the_label_and_not_the_family() -> None:
    """What --prediction module asks for is the module's class, whatever a matrix makes of it."""
    head = linear(3)
    four = [heads.rows(head, "classification", 300, i) for i in range(4)]
    parts = Parts(four[0], dataclasses.replace(four[1], y=(four[1].z[:, ::-1]).argmax(1)), four[2])
    found = {}
    for scaling in ("temperature", "sms"):
        options = FitOptions(
            task="classification",
            method="vbll",
            prediction="module",
            scaling=scaling,
            conformal="lac",
        )
        done = fit_head(head, parts, options)
        found[scaling] = run_head(done.head, four[3])
        check_head(done.head, compile_head(done.head), four[3].phi, four[3].z)
    made = found["sms"]
    np.testing.assert_array_equal(made["label"], found["temperature"]["label"])
    assert (made["probs"].argmax(1) != made["label"]).mean() > 0.1
    own = made["probs"][np.arange(300), made["label"]]
    np.testing.assert_array_equal(made["confidence"], own)


def test_a_bundle_says_and_keeps_it(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", scaling="auto", confidence="beta", method="none")
    manifest = load_bundle(bundle).manifest
    assert manifest.family is not None and manifest.confidence == "beta"
    assert manifest.family.gains.keys() == {"ets", "svs", "sms"}
    forced = tiny_bundle(tmp_path / "c", scaling="svs", method="laplace")
    predictor = Predictor(forced)
    predictor.self_check()
    assert {"family/weight", "family/bias"} <= predictor.bundle.tensors("state.safetensors").keys()
    x, _ = rows("classification", 200, 5)
    out = predictor.predict({"x": x})
    np.testing.assert_allclose(out.probs.sum(1), 1, atol=1e-5)


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="are for classification"):
        tiny_bundle(tmp_path / "b", "regression", scaling="svs")
    with pytest.raises(FitError, match="two classes and this model has 3"):
        tiny_bundle(tmp_path / "c", scaling="beta", method="none")
