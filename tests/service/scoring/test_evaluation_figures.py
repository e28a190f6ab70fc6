"""Figures of labelled rows that are right by an oracle: weights, bands and intervals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from calibration.bundle import load_bundle
from calibration.metrics.binomial import share_interval
from calibration.metrics.calibration_error import perfect_band
from calibration.metrics.totals import RegressionTotals
from calibration.predictor import Predictor
from posthoc.contract import DataError
from service.scoring import labelled
from service.scoring.evaluation import report
from service.scoring.labelled import Labelled, labels_of
from tests.service.scoring.measured import (
    labelled_table,
    run_scored,
)


def test_no_label_leaves_no_figure(bundle: Path, tmp_path: Path) -> None:
    table = labelled_table(bundle, "classification", 50, 0)
    at = table.schema.get_field_index("target")
    got = run_scored(bundle, table.set_column(at, "target", pa.nulls(50)), tmp_path)
    assert got["rows"]["unlabelled"] == 50
    assert (got["metrics"], got["levels"]) == ({}, {})
    assert "no row is left to be measured" in got["notes"]


def test_missing_labels_are_weighed_by_what_was_served(bundle: Path, tmp_path: Path) -> None:
    table = labelled_table(bundle, "classification", 600, 0)
    whole = run_scored(bundle, table, tmp_path)
    assert whole["stratified"] is None
    confidence = pq.read_table(tmp_path / "out" / "input.parquet")["confidence"].to_numpy()
    truth = table["target"].to_pylist()
    kept = [
        y if c < 0.7 or i % 4 == 0 else None
        for i, (y, c) in enumerate(zip(truth, confidence, strict=True))
    ]
    at = table.schema.get_field_index("target")
    (tmp_path / "few").mkdir()
    few = run_scored(bundle, table.set_column(at, "target", pa.array(kept)), tmp_path / "few")
    label = pq.read_table(tmp_path / "out" / "input.parquet")["label"].to_pylist()
    total = right = 0.0
    edges = np.arange(1, 21) / 20
    bins = [int((edges < float(c)).sum()) for c in confidence]
    for b in set(bins):
        inside = [i for i in range(600) if bins[i] == b]
        known = [i for i in inside if kept[i] is not None]
        if known:
            total += len(inside)
            right += len(inside) * np.mean([kept[i] == label[i] for i in known])
    assert few["stratified"]["accuracy"] == pytest.approx(right / total, abs=1e-9)
    assert few["stratified"]["share"] == pytest.approx(total / 600)
    assert "missing at random" in few["stratified"]["assumes"]


def test_a_fitted_level_has_the_range_of_a_perfect_model(bundle: Path, tmp_path: Path) -> None:
    got = run_scored(bundle, labelled_table(bundle, "classification", 800, 0), tmp_path)
    confidence = pq.read_table(tmp_path / "out" / "input.parquet")["confidence"].to_numpy()
    want = perfect_band(confidence, seed=1)  # draws every row from its own confidence
    for name in ("ece", "debiased_ece"):
        low, high = getattr(want, name)
        figure = got["metrics"][name]
        assert figure["range"] == "perfect"
        close = 0.15 * (high - low)
        assert (figure["low"], figure["high"]) == pytest.approx((low, high), abs=close)


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 30), (7, 30), (30, 30), (1_234, 9_999)])
def test_the_interval_of_a_share_is_the_exact_one(hits: int, n: int) -> None:
    exact = binomtest(hits, n).proportion_ci(0.95, "exact")
    assert share_interval(hits, n) == pytest.approx((exact.low, exact.high), abs=1e-12)
    with pytest.raises(DataError, match="no share"):
        share_interval(n + 1, n)


def test_the_interval_of_a_mean_covers(regressor: Path) -> None:
    manifest = load_bundle(regressor).manifest
    labels = labels_of(Predictor(regressor), ["y"], None, pa.schema([("y", pa.float64())]))
    rng = np.random.default_rng(0)
    inside = {"rmse": 0, "crps": 0}
    for _ in range(500):
        losses = rng.gamma(0.8, 1.0, 400)  # skewed, of mean 0.8
        total, squares = float(losses.sum()), float((losses**2).sum())
        totals = RegressionTotals(
            n=400, squared_error_sum=total, absolute_error_sum=total, crps_sum=total
        )
        sums = dict.fromkeys(("squared_error", "mae", "crps", "nll"), squares)
        found = Labelled(totals, sums, labelled.nothing(labels).pit)
        found.pit[0][0] += 1  # type: ignore[index]  # the range of PCE is of one value at least
        figures = report(labels, found, None, manifest)["metrics"]
        assert figures["crps"]["value"] == pytest.approx(losses.mean())
        for name, truth in (("rmse", math.sqrt(0.8)), ("crps", 0.8)):
            inside[name] += figures[name]["low"] <= truth <= figures[name]["high"]
    assert all(0.92 <= k / 500 <= 0.975 for k in inside.values()), inside
