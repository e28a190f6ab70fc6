"""The bias of expected accuracy in a window, from what a ledger's calibration says of it."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.drift.label_free import measured_bias
from calibration.metrics.totals import BIN_LABELS, N_BINS, bin_index
from service.labels import Totals
from service.monitor.window import bias_of, bounds_of
from service.summary import summary_of
from tests.calibration.drift.test_label_free import labelled

KEY = ("m", "1", "classification")


def summed(confidence, totals: Totals | None):
    """What `service.summary` says of these served rows."""
    index = bin_index(confidence)
    served = {
        int(b): (int((index == b).sum()), float(confidence[index == b].sum())) for b in set(index)
    }
    known = {} if totals is None else {KEY[:2]: totals}
    (model,) = summary_of({KEY: served}, known, {}, None, {}, {})["models"]
    return model


def test_it_is_that_of_the_totals():
    rng = np.random.default_rng(0)
    c = rng.beta(4, 1, 3000)
    asked = rng.random(3000) < np.where(c < 0.7, 0.5, 0.1)
    totals = labelled(c[asked], rng.random(asked.sum()) < c[asked] ** 2)
    found, want = (
        bias_of(summed(c, totals)),
        measured_bias(np.bincount(bin_index(c), minlength=N_BINS), totals),
    )
    assert found is not None
    for name in type(want).__slots__:
        assert getattr(found, name) == pytest.approx(getattr(want, name), abs=1e-12)
    bounds = bounds_of(found)
    assert set(bounds) == {"raw", "stratified"}
    assert set(bounds["raw"]) == {"value", "lower", "upper", "chance"}
    raw = bounds["raw"]
    assert raw["upper"] - raw["value"] == pytest.approx(raw["value"] - raw["lower"])
    assert raw["upper"] - raw["value"] == pytest.approx(1.96 * want.raw_error)
    assert raw["chance"] == pytest.approx(3 * want.spread)


def bins(**by_bin):
    """Bins of no rows, but for those that are named by their number."""
    empty = {"served": 0, "labelled": 0, "correct": 0, "confidence": None}
    return [{"bin": b, **empty, **by_bin.get(f"b{i}", {})} for i, b in enumerate(BIN_LABELS)]


def test_without_labels_there_is_none():
    assert bias_of(summed(np.full(5, 0.7), None)) is None
    assert bias_of({"model": "m", "task": "regression", "labelled": 7}) is None
    assert bias_of({"bins": bins(b3={"served": 4})}) is None


def test_labels_of_rows_that_were_served_elsewhere_have_no_stratified_one():
    """A window may hold labels of a bin none of whose rows it holds."""
    one = {"labelled": 2, "correct": 1, "confidence": 0.48}
    found = bias_of({"bins": bins(b3={"served": 4}, b9=one)})
    assert found is not None and found.raw == pytest.approx(-0.02)
    assert set(bounds_of(found)) == {"raw"}
