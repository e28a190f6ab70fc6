"""Intervals and quantiles of every kind in a whole fit: covered on rows that nobody saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.conformal.intervals import INTERVALS
from calibration.evaluate import evaluate
from calibration.fit import fit_material
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import run_head
from calibration.material import Material
from calibration.metrics.coverage import coverage_band
from calibration.predictor import Predictor
from posthoc.contract import FitError
from service.settings import Settings
from tests.factory import data, rows, tiny_bundle
from tests.service.conftest import Server


@pytest.mark.parametrize("method", INTERVALS)
@pytest.mark.parametrize("side", ["two", "lower", "upper"])
def test_intervals_cover_inside_the_band(values: Material, method: str, side: Any) -> None:
    inside = 0
    for seed in range(5):
        options = FitOptions(task="regression", conformal=method, side=side, seed=seed)
        done, test, _ = fit_material(values, options)
        out = run_head(done.head, test)
        covered = ((test.y >= out["lower"]) & (test.y <= out["upper"])).all(1).mean()
        first = done.conformal.guarantees[0]
        low, high = coverage_band(first.n, len(test), first.alpha)
        inside += low <= covered <= high
        assert done.conformal.method == method
    assert inside >= 4


@pytest.mark.parametrize("kind", ["emp", "linear", "kde"])
def test_quantiles_are_exceeded_as_often_as_they_say(values: Material, kind: Any) -> None:
    levels = (0.1, 0.5, 0.9)
    options = FitOptions(task="regression", recalibration=kind, quantile_levels=levels)
    done, test, _ = fit_material(values, options)
    made = run_head(done.head, test)["quantiles"]
    assert (np.diff(made, axis=2) >= 0).all()
    n = done.conformal.guarantees[0].n
    for i, level in enumerate(levels):
        below = (test.y <= made[:, :, i]).mean()
        assert abs(below - level) < 4 * np.sqrt(level * (1 - level) * (1 / n + 1 / len(test)))


def test_one_end_is_served_as_null(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", "regression", side="upper", conformal="absolute")
    predictor = Predictor(bundle)
    x, _ = rows("regression", 3, 5)
    out = predictor.run({"x": x})
    assert np.isneginf(out["lower"]).all() and np.isfinite(out["upper"]).all()
    conformal = predictor.manifest.conformal
    assert conformal.method == "absolute" and conformal.settings["side"] == "upper"
    with Server(Settings(bundles=bundle, data_dir=tmp_path / "data")) as server:
        made = server.client.post("/v1/predict", json={"inputs": {"x": x.tolist()}}).json()
    assert [p["lower"] for p in made["predictions"]] == [None] * 3
    np.testing.assert_allclose(
        [p["upper"] for p in made["predictions"]], out["upper"][:, 0], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conformal": "lac"}, "unknown conformal method 'lac' for regression; .* cqr"),
        ({"quantile_levels": (0.5, 0.1)}, "rise strictly between 0 and 1"),
        ({"quantile_levels": (0.0, 0.1)}, "rise strictly between 0 and 1"),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        tiny_bundle(tmp_path / "b", "regression", **options)
    with pytest.raises(FitError, match="are for regression"):
        tiny_bundle(tmp_path / "c", side="upper")


def test_a_density_has_a_likelihood(tmp_path: Path) -> None:
    """Of the recalibrated distribution, in the fit's figures and in an evaluation; empirical
    quantiles have none."""
    skewed = tiny_bundle(tmp_path / "kde", "regression", recalibration="kde")
    figures = Predictor(skewed).manifest.evaluation["hedged"]
    found = evaluate(skewed, data(tmp_path / "fresh.parquet", "regression", n=1500, seed=7))
    (hedged,) = [s for s in found.systems if s.name == "hedged"]
    assert hedged.metrics["nll_recalibrated"].value == pytest.approx(
        figures["nll_recalibrated"], abs=0.15
    )
    # The noise is Gaussian, so that there is little to win.
    assert figures["nll_recalibrated"] == pytest.approx(figures["nll"], abs=0.1)
    plain = tiny_bundle(tmp_path / "emp", "regression")
    assert "nll_recalibrated" not in Predictor(plain).manifest.evaluation["hedged"]
