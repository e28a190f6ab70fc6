"""What is promised of magika, a deployed classifier of 214 file types, over seeded re-splits: in
``make test-long``, one split of it with the demo in ``make test``.

All rows are real files of pinned packages; strange rows are files of types it was never taught.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from bench.material import Known, magika
from bench.resplits import figures, run
from calibration.fit import fit_material
from calibration.fit_options import FitOptions

pytestmark = pytest.mark.long
ALPHAS = ("0.1", "0.05")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Five seeds and their means."""
    return run(quick=True)


def test_labels_are_the_frozen_models_row_by_row(found: dict[str, Any]) -> None:
    assert found["seeds"] == 5
    assert [r["labels_equal"] for r in found["rows"]] == [1.0] * 5
    assert all(r["test_rows"] > 1500 for r in found["rows"])


def test_the_module_costs_no_likelihood(found: dict[str, Any]) -> None:
    assert found["mean_nll_difference"] <= 0.002
    assert found["mean_nll_scaled"] < found["mean_nll_frozen"]  # it is over-confident on this mix


def test_the_module_costs_no_calibration(found: dict[str, Any]) -> None:
    """Debiased ECE less that of temperature scaling: not worse by 0.003 beyond the interval."""
    assert found["mean_ece_difference_low"] <= 0.003
    # Stronger, and of the estimate itself: five splits average much of the noise away.
    assert found["mean_ece_difference"] <= 0.003


def test_the_module_is_not_temperature_scaling_in_disguise(found: dict[str, Any]) -> None:
    for r in found["rows"]:
        assert 1e-6 < r["prior_precision"] < 1e6  # the search's bounds are 1e-8 and 1e12
        assert r["strength"] > 0
    assert found["mean_epistemic_auroc"] >= 0.6


def test_unknown_types_are_told_at_least_as_well_as_by_softmax(found: dict[str, Any]) -> None:
    assert found["mean_ood_auroc"] >= found["mean_msp_auroc"]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_raw_sets_cover_inside_the_band(found: dict[str, Any], alpha: str) -> None:
    """A valid split leaves the 99 % band with probability 0.01 at most, so of five splits two or
    more leave it with probability 0.001: one miss is luck, two are a defect."""
    assert binom.sf(1, 5, 0.01) < 0.001
    assert found["inside_band"][alpha] >= 4
    for r in found["rows"]:
        assert r["coverage"][alpha] + r["empty"][alpha] <= 1
        assert r["set_size"][alpha] >= r["coverage"][alpha]


def test_scores_do_not_tie_at_the_thresholds() -> None:
    """So that both edges of the band count."""
    known: Known = magika()
    done, _, _ = fit_material(known.material, FitOptions(task="classification"))
    for g in done.conformal.guarantees:
        assert (done.scores["set"] == g.threshold).sum() == 1


def test_twenty_splits() -> None:
    """18 of 20: a correct build falls below with probability 0.001 at a miss rate of 1 %."""
    assert binom.cdf(17, 20, 0.99) < 0.0011
    known = magika()
    splits = [figures(known, seed) for seed in range(20)]
    assert all(s["labels_equal"] == 1.0 for s in splits)
    for alpha in ALPHAS:
        inside = sum(
            s["band"][alpha][0] <= s["coverage"][alpha] <= s["band"][alpha][1] for s in splits
        )
        assert inside >= 18, alpha
    assert np.mean([s["nll_difference"] for s in splits]) <= 0.002
    assert np.mean([s["epistemic_auroc"] for s in splits]) >= 0.6
    assert np.mean([s["ood_auroc"] - s["msp_auroc"] for s in splits]) >= 0
