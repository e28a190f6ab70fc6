"""The bias of expected accuracy in a window, from what a ledger's calibration says of it."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.drift.label_free import measured_bias
from calibration.metrics.totals import N_BINS, bin_index
from service.labels import Totals
from service.monitor.window import bounds_of
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
    want = measured_bias(np.bincount(bin_index(c), minlength=N_BINS), totals)
    bounds = bounds_of(summed(c, totals))
    assert set(bounds) == {"raw", "stratified"}
    assert set(bounds["raw"]) == {"value", "lower", "upper", "chance"}
    for kind in bounds:
        value, error = getattr(want, kind), getattr(want, f"{kind}_error")
        assert bounds[kind]["value"] == pytest.approx(value, abs=1e-12)
        assert bounds[kind]["lower"] == pytest.approx(value - 1.96 * error)
        assert bounds[kind]["upper"] == pytest.approx(value + 1.96 * error)
    assert bounds["raw"]["chance"] == pytest.approx(3 * want.spread)


def test_without_labels_there_is_none():
    assert bounds_of(summed(np.full(5, 0.7), None)) == {}
    assert bounds_of({"model": "m", "task": "regression", "labelled": 7}) == {}


def test_labels_of_rows_that_were_served_elsewhere_have_no_stratified_one():
    """A window may hold labels of a bin none of whose rows it holds."""
    found = bounds_of(summed(np.full(4, 0.18), labelled(np.full(2, 0.48), np.array([True, False]))))
    assert set(found) == {"raw"} and found["raw"]["value"] == pytest.approx(-0.02)
