"""What the ledger answers, on a real SQLite file and on a real PostgreSQL server."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from service.labels import LabelItem
from service.ledger import Ledger, LedgerError
from service.rows import MAX_STORED_CLASSES
from service.schema import ledger_key, ledger_url
from tests.service.ledger.helpers import entry, join, labels, record, until
from tests.service.streams import (
    IDENTITY,
    LEVEL,
    MODEL,
    VERSION,
    by_definition,
    classification,
    regression,
)


def test_calibration_is_what_the_definitions_say(ledger):
    stream = classification(700)
    for start in range(0, 700, 64):
        assert record(ledger, stream, list(range(start, min(start + 64, 700))))
    assert ledger.flush()
    chosen = list(range(0, 700, 3))
    assert set(ledger.add_labels(labels(stream, chosen))) == {"accepted"}
    assert len(join(ledger, 50)) == len(chosen)
    found, expected = entry(ledger), by_definition(stream, chosen)
    assert (found["model"], found["version"], found["task"]) == ("m", "1", "classification")
    assert (found["served"], found["labelled"]) == (700, len(chosen))
    for name in ("accuracy", "ece", "log_loss", "brier"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12), name
    coverage = found["coverage"][LEVEL]
    assert coverage["labelled"] == len(chosen)
    assert coverage["coverage"] == expected["coverage"]
    assert coverage["mean_size"] == expected["mean_size"]
    confidence = stream.fields["confidence"].astype(np.float64)
    assert found["expected_accuracy"] == pytest.approx(confidence.mean(), abs=1e-12)
    for b, row in enumerate(found["bins"]):
        inside = np.flatnonzero((confidence > b / 20) & (confidence <= (b + 1) / 20))
        known = np.intersect1d(inside, chosen)
        assert row["bin"] == f"{(b + 1) / 20:.2f}"
        assert (row["served"], row["labelled"]) == (len(inside), len(known))
        assert row["label_coverage"] == (len(known) / len(inside) if len(inside) else None)
    json.dumps(ledger.calibration(), allow_nan=False)


def test_regression_with_two_outputs_and_unbounded_intervals(ledger):
    stream = regression(120)
    stream.fields["lower"][100:] = -np.inf
    stream.fields["upper"][100:] = np.inf
    record(ledger, stream, list(range(100)))
    record(ledger, stream, list(range(100, 120)), level="0.99")
    ledger.flush()
    assert set(ledger.add_labels(labels(stream))) == {"accepted"}
    assert ledger.add_labels([LabelItem(MODEL, "row-0", 1.0)]) == ["invalid"]
    assert len(join(ledger)) == 120
    found = entry(ledger)
    error = stream.y - stream.fields["mean"].astype(np.float64)
    assert found["mae"] == pytest.approx(np.abs(error).mean())
    assert found["rmse"] == pytest.approx(np.sqrt((error**2).mean()))
    inside = (np.abs(error) <= 1.5 * stream.fields["std"]).all(axis=1)[:100]
    assert found["coverage"]["0.9"]["covered"] == inside.sum()
    assert found["coverage"]["0.99"] == {
        "labelled": 20,
        "covered": 20,
        "coverage": 1.0,
        "mean_size": None,
    }
    json.dumps(found, allow_nan=False)


def test_an_empty_ledger_has_no_numbers(ledger):
    assert ledger.calibration() == {"since": None, "models": [], "feedback": {}}
    assert ledger.claim(10) == []
    ledger.register(MODEL, VERSION, IDENTITY, task="classification", classes=("a", "b"))
    ledger.flush()
    found = entry(ledger)
    assert (found["served"], found["ece"], found["coverage"]) == (0, None, {})


def test_a_repeated_id_keeps_the_first_prediction(ledger):
    stream, later = classification(50), classification(50, seed=1)
    record(ledger, stream)
    ledger.flush()
    record(ledger, later)
    record(ledger, classification(3, seed=2), model="another")
    ledger.flush()
    ledger.add_labels(labels(stream))
    join(ledger)
    assert [m["served"] for m in ledger.calibration()["models"]] == [50, 3]
    found = entry(ledger, model=MODEL)
    assert found["brier"] == pytest.approx(by_definition(stream, list(range(50)))["brier"])


def test_every_result_of_a_label(ledger):
    stream = classification(5)
    record(ledger, stream)
    ledger.register("named", "1", "b" * 64, task="classification", classes=("cat", "dog"))
    ledger.flush()
    y = stream.label(0)
    items = [
        LabelItem(MODEL, "row-0", y),
        LabelItem(MODEL, "row-0", y),  # in one request
        LabelItem(MODEL, "row-0", (y + 1) % 7),
        LabelItem(MODEL, "row-1", 7),
        LabelItem(MODEL, "row-1", 1.0),
        LabelItem(MODEL, "row-1", "cat"),
        LabelItem(MODEL, "row 1", 1),
        LabelItem(MODEL, "", 1),
        LabelItem(MODEL, "x" * 129, 1),
        LabelItem(MODEL, "later", 1),
        LabelItem(None, "row-2", stream.label(2)),  # only one model has this id
        LabelItem(None, "nobody", 1),  # two models, and it could be either
        LabelItem("named", "n", "dog"),
        LabelItem("named", "n", 1),
        LabelItem("named", "n", "bird"),
    ]
    assert ledger.add_labels(items) == [
        "accepted",
        "duplicate",
        "conflict",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "pending",
        "accepted",
        "invalid",
        "pending",
        "duplicate",
        "invalid",
    ]
    assert ledger.add_labels(items[:3]) == ["duplicate", "duplicate", "conflict"]
    assert len(join(ledger)) == 2
    assert ledger.add_labels(items[:3]) == ["duplicate", "duplicate", "conflict"]
    assert join(ledger) == []
    feedback = ledger.calibration()["feedback"]
    assert feedback[MODEL] == {
        "accepted": 2,
        "conflict": 3,
        "duplicate": 5,
        "invalid": 6,
        "joined": 2,
        "pending": 1,
        "waiting": 1,
    }
    assert feedback[""] == {"invalid": 1}
    assert feedback["named"] == {"duplicate": 1, "invalid": 1, "pending": 1, "waiting": 1}


def test_labels_that_come_first_are_judged_by_the_bundle_that_predicts(ledger):
    stream = classification(4, classes=3)
    # Nothing is known of the model yet: a name, an index, and what will turn out to be neither.
    first = [
        LabelItem(MODEL, "row-0", "c"),
        LabelItem(MODEL, "row-1", 1),
        LabelItem(MODEL, "row-2", "z"),
        LabelItem(MODEL, "row-3", 3),
    ]
    assert ledger.add_labels(first) == ["pending"] * 4
    assert ledger.add_labels([LabelItem("stranger" * 9, f"row-{i}", 0) for i in range(3)])
    # The class order of this version, not of the latest one, gives a name its index.
    ledger.register(MODEL, VERSION, IDENTITY, task="classification", classes=("a", "b", "c"))
    ledger.register(MODEL, "2", "b" * 64, task="classification", classes=("c", "b", "a"))
    record(ledger, stream)
    ledger.flush()
    assert ledger.add_labels([LabelItem(MODEL, "row-0", 2)]) == ["duplicate"]
    assert ledger.add_labels([LabelItem(MODEL, "row-2", 2)]) == ["conflict"]
    rows = []
    until(lambda: bool(rows.extend(join(ledger))) or len(rows) == 2)
    assert sorted(r.value for r in rows) == [1, 2]
    until(lambda: join(ledger) == [] and "waiting" not in ledger.calibration()["feedback"][MODEL])
    # What did not fit was removed and counted, so that the right label may still come.
    assert ledger.calibration()["feedback"][MODEL]["invalid"] == 2
    assert ledger.add_labels([LabelItem(MODEL, "row-2", 2)]) == ["accepted"]
    # Names of models that do not exist are no keys.
    assert set(ledger.calibration()["feedback"]) == {"", MODEL}


def test_a_label_without_prediction_expires(ledger):
    stream = classification(2)
    record(ledger, stream)
    ledger.flush()
    ledger.add_labels([LabelItem(MODEL, "nobody", 1), *labels(stream, [0])])
    join(ledger)
    assert ledger.expire(3600) == 0
    assert ledger.expire(0) == 1
    assert ledger.calibration()["feedback"][MODEL]["expired"] == 1
    assert entry(ledger)["labelled"] == 1


def test_forget_erases_the_prediction_and_its_label(ledger):
    stream = classification(10)
    record(ledger, stream)
    record(ledger, stream, model="another")
    ledger.flush()
    ledger.add_labels(labels(stream))
    join(ledger)
    record(ledger, classification(11), [10])  # still in the queue
    assert ledger.forget("row-10", MODEL) == 1
    assert ledger.forget("row-3", MODEL) == 1
    assert ledger.forget("row-3", MODEL) == 0
    assert ledger.forget("row-4") == 2
    found = entry(ledger, model=MODEL)
    assert (found["served"], found["labelled"]) == (8, 8)
    kept = [i for i in range(10) if i not in (3, 4)]
    assert found["brier"] == pytest.approx(by_definition(stream, kept)["brier"])


def test_since_and_groups(ledger):
    stream = classification(20)
    record(ledger, stream, list(range(10)), group=np.arange(10) - 2**62)
    ledger.flush()
    middle = time.time()
    record(ledger, stream, list(range(10, 20)))
    ledger.flush()
    ledger.add_labels(labels(stream))
    join(ledger)
    found = entry(ledger, since=middle)
    assert (found["served"], found["labelled"]) == (10, 10)
    expected = by_definition(stream, list(range(10, 20)))
    assert found["log_loss"] == pytest.approx(expected["log_loss"])


def test_above_a_thousand_classes_probs_are_not_kept(ledger):
    stream = classification(6, classes=MAX_STORED_CLASSES + 1)
    record(ledger, stream)
    ledger.flush()
    assert set(ledger.add_labels(labels(stream))) == {"accepted"}
    assert ledger.add_labels([LabelItem(MODEL, "row-0", 1001)]) == ["invalid"]
    rows = join(ledger)
    assert {r.probs for r in rows} == {None}
    found, expected = entry(ledger), by_definition(stream, list(range(6)))
    assert (found["log_loss"], found["brier"]) == (None, None)
    assert found["ece"] == pytest.approx(expected["ece"])
    assert found["coverage"][LEVEL]["coverage"] == expected["coverage"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://h/d", "mysql"),
        ("sqlite://", "sqlite"),
        ("postgresql://h:port/d", "cannot be read"),
    ],
)
def test_urls_that_are_no_ledger(url, message):
    with pytest.raises(LedgerError, match=message):
        ledger_url(url)


def test_a_path_that_cannot_be_opened(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger.open(tmp_path / "taken")
    (tmp_path / "text").write_text("this is no database, and long enough to have a header\n" * 9)
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger.open(tmp_path / "text")


def test_the_key_of_a_ledger_hides_its_password():
    one, two, other = (
        ledger_key(ledger_url(f"postgresql://{who}@host/{db}"))
        for who, db in (("u:secret", "a"), ("v:changed", "a"), ("u:secret", "b"))
    )
    assert one == two != other


def test_bundles_are_known_while_their_predictions_may_get_labels(ledger):
    options = {"task": "classification", "width": 7}
    ledger.register(MODEL, "0", "c" * 64, **options)
    ledger.register(MODEL, VERSION, IDENTITY, levels=(LEVEL, "0.95"), **options)
    assert ledger.sources(3600) == []  # nobody predicted
    record(ledger, classification(3))
    ledger.flush()
    (source,) = ledger.sources(3600)
    assert (source.version, source.levels, source.width) == (VERSION, (LEVEL, "0.95"), 7)
    assert ledger.sources(-3600) == []
