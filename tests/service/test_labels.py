"""What a label may be, and that joined rows add up to the definitions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.metrics.totals import ClassificationTotals, RegressionTotals
from posthoc.contract import DataError
from service.labels import Joined, merge_totals, parse_label, totals_of
from tests.service.streams import LEVEL, by_definition, classification, regression

CLASSES = ("cat", "dog", "7")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("value", "task", "options", "expected"),
    [
        (2, "classification", {"width": 3}, 2),
        (np.int64(0), "classification", {"width": 3}, 0),
        ("dog", "classification", {"classes": CLASSES}, 1),
        ("7", "classification", {"classes": CLASSES}, 2),
        (1, "classification", {"classes": CLASSES}, 1),
        (5, "classification", {}, 5),
        (1, "regression", {}, [1.0]),
        (1.5, "regression", {"width": 1}, [1.5]),
        ([1, 2.5], "regression", {"width": 2}, [1.0, 2.5]),
    ],
)
def test_labels_that_are_right(value, task, options, expected):
    found = parse_label(value, task, **options)
    assert found == expected
    assert json.loads(json.dumps(found)) == expected


@pytest.mark.parametrize(
    ("value", "task", "options", "message"),
    [
        (3, "classification", {"width": 3}, "0…2"),
        (-1, "classification", {"width": 3}, "0…2"),
        (True, "classification", {"width": 3}, "True is no class"),
        (1.0, "classification", {"width": 3}, "1.0 is no class"),
        (None, "classification", {}, "None is no class"),
        (2**31, "classification", {}, "no class"),
        ("bird", "classification", {"classes": CLASSES}, "none of the 3 classes"),
        ("cat", "classification", {"width": 3}, "send the class index"),
        (math.nan, "regression", {}, "finite"),
        ([1.0, math.inf], "regression", {}, "finite"),
        ([], "regression", {}, "finite"),
        ("1.5", "regression", {}, "finite"),
        (False, "regression", {}, "finite"),
        ([1.0], "regression", {"width": 2}, "2 outputs"),
        ([[1.0]], "regression", {"width": 1}, "finite"),
    ],
)
def test_labels_that_are_wrong_say_why(value, task, options, message):
    with pytest.raises(DataError, match=message):
        parse_label(value, task, **options)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(JSON, st.sampled_from(["classification", "regression"]), st.none() | st.just(CLASSES))
def test_any_json_is_a_label_or_a_data_error(value, task, classes):
    try:
        found = parse_label(value, task, classes=classes, width=3)
    except DataError:
        return
    again = parse_label(found, task, classes=classes, width=3)
    assert again == found
    values = [found] if isinstance(found, int) else found
    assert all(math.isfinite(v) for v in values)


def joined(stream, rows, *, version="1", level=LEVEL):
    """Rows as the ledger gives them."""
    f = stream.fields
    blobs = {
        k: (lambda i, k=k: f[k][i].astype("<f4").tobytes()) if k in f else (lambda i: None)
        for k in ("probs", "mean", "std", "lower", "upper")
    }
    return [
        Joined(
            model="m",
            version=version,
            task="classification" if "probs" in f else "regression",
            value=stream.label(i),
            predicted=0.0,
            received=1.0,
            level=level,
            label=int(f["label"][i]) if "label" in f else None,
            confidence=float(f["confidence"][i]) if "confidence" in f else None,
            set=np.packbits(f["set"][i]).tobytes() if "set" in f else None,
            **{k: blob(i) for k, blob in blobs.items()},
        )
        for i in rows
    ]


@pytest.mark.parametrize("classes", [2, 7, 8, 9])
def test_classification_rows_add_up_to_the_definitions(classes):
    stream = classification(300, classes=classes, seed=1)
    rows = list(range(300))
    (totals,) = totals_of(joined(stream, rows)).values()
    expected = by_definition(stream, rows)
    assert isinstance(totals, ClassificationTotals)
    assert totals.n == 300
    assert totals.ece == pytest.approx(expected["ece"], abs=1e-12)
    assert totals.brier == pytest.approx(expected["brier"], abs=1e-12)
    assert totals.log_loss == pytest.approx(expected["log_loss"], abs=1e-12)
    assert totals.coverage(LEVEL) == expected["coverage"]
    assert totals.levels[LEVEL].mean_size == expected["mean_size"]


def test_regression_rows_add_up_to_the_definitions():
    stream = regression(200)
    (totals,) = totals_of(joined(stream, range(200))).values()
    assert isinstance(totals, RegressionTotals)
    f = {k: v.astype(np.float64) for k, v in stream.fields.items()}
    inside = [
        all(f["lower"][i, k] <= stream.y[i, k] <= f["upper"][i, k] for k in range(2))
        for i in range(200)
    ]
    assert totals.coverage(LEVEL) == sum(inside) / 200
    assert totals.levels[LEVEL].mean_size == pytest.approx((f["upper"] - f["lower"]).mean())
    assert totals.mae == pytest.approx(np.abs(stream.y - f["mean"]).mean())


def test_rows_of_several_versions_levels_and_widths_are_kept_apart():
    a, b = classification(40, seed=1), classification(60, classes=3, seed=2)
    rows = [
        *joined(a, range(20)),
        *joined(b, range(30), version="2"),
        *joined(a, range(20, 40), level=None),
        *joined(b, range(30, 60), version="2", level="0.95"),
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    found = totals_of([rows[i] for i in order])
    assert set(found) == {("m", "1"), ("m", "2")}
    one, two = found["m", "1"], found["m", "2"]
    assert one.ece == pytest.approx(by_definition(a, list(range(40)))["ece"], abs=1e-12)
    assert one.coverage(LEVEL) == by_definition(a, list(range(20)))["coverage"]
    assert {k: v.labeled for k, v in two.levels.items()} == {LEVEL: 30, "0.95": 30}
    assert two.coverage("0.95") == by_definition(b, list(range(30, 60)))["coverage"]


def test_totals_of_two_tasks_do_not_mix():
    with pytest.raises(DataError, match="classification and regression"):
        merge_totals(ClassificationTotals(), RegressionTotals())
    stream = classification(2)
    rows = [*joined(stream, [0]), *joined(regression(2), [0])]
    with pytest.raises(DataError, match="two tasks"):
        totals_of(rows)
