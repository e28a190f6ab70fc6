"""What is old leaves the ledger in bounded parts, and nothing else does."""

from __future__ import annotations

import time

import numpy as np
import pytest
import sqlalchemy as sa

from service import instruments, migrations
from service.joiner import Joiner
from service.labels import LabelItem
from service.schema import images, ledger_url, make_engine, predictions
from service.schema import labels as labels_table
from service.upkeep import opened
from tests.service.ledger.helpers import entry, join, labels, metric, record, until
from tests.service.streams import (
    IDENTITY,
    LEVEL,
    MODEL,
    VERSION,
    by_definition,
    classification,
    regression,
)

DAY = 86_400.0


def age(url: str, ids: list[str], days: float, table: sa.Table = predictions) -> None:
    """Make rows older than they are."""
    engine = make_engine(ledger_url(url))
    column = table.c.received if table is labels_table else table.c.time
    with engine.begin() as conn:
        change = sa.update(table).where(table.c.id.in_(ids))
        conn.execute(change.values({column: column - days * DAY}))
    engine.dispose()


def test_old_predictions_leave_with_their_labels(url, ledger):
    stream, other = classification(60), regression(60)
    record(ledger, stream)
    record(ledger, other, model="another")
    ledger.flush()
    ledger.add_labels(labels(stream, range(50)))
    ledger.add_labels(labels(other, range(10), model="another"))
    join(ledger)
    before = ledger.calibration()["feedback"]
    age(url, stream.ids[:30], 100)  # of both models
    age(url, stream.ids[30:35], 80)
    assert entry(ledger, model=MODEL)["oldest"] == pytest.approx(time.time() - 100 * DAY, abs=600)
    parts = []
    while not parts or parts[-1]:
        parts.append(ledger.purge(90 * DAY, 7))
    assert sum(parts) == 60 and max(parts) == 7
    found = entry(ledger, model=MODEL)
    assert (found["served"], found["labelled"]) == (30, 20)
    assert found["oldest"] == pytest.approx(time.time() - 80 * DAY, abs=600)
    assert found["brier"] == pytest.approx(by_definition(stream, [*range(30, 50)])["brier"])
    assert entry(ledger, model="another")["labelled"] == 0
    # What became of labels is not forgotten with them.
    assert ledger.calibration()["feedback"] == before
    # A label that comes again belongs to a prediction that is unknown by now.
    assert ledger.add_labels(labels(stream, [0])) == ["pending"]


def test_a_prediction_whose_label_was_not_counted_stays(url, ledger):
    stream = classification(4)
    record(ledger, stream)
    ledger.flush()
    ledger.add_labels(labels(stream, [1, 2]))
    age(url, stream.ids, 100)
    age(url, stream.ids, 100, labels_table)
    assert ledger.purge(90 * DAY) == 2
    assert ledger.expire(0) == 0  # nor is its label given up
    assert len(join(ledger)) == 2
    assert ledger.purge(90 * DAY) == 2
    assert entry(ledger)["served"] == 0


def test_images_and_waiting_labels_leave_in_parts(url, ledger):
    ids = [f"image-{i}" for i in range(9)]
    summary = {"confidence": np.full(9, 0.5), "abstain": np.zeros(9)}
    assert ledger.record_images(MODEL, VERSION, IDENTITY, ids, summary, LEVEL)
    ledger.flush()
    age(url, ids[:6], 100, images)
    assert [ledger.purge(90 * DAY, 4) for _ in range(3)] == [4, 2, 0]
    found = entry(ledger)
    assert found["served"] == 3 and found["oldest"] == pytest.approx(time.time(), abs=600)
    ledger.add_labels([LabelItem(MODEL, f"nobody-{i}", 1) for i in range(5)])
    assert [ledger.expire(0, 3) for _ in range(3)] == [3, 2, 0]
    assert ledger.calibration()["feedback"][MODEL]["expired"] == 5


def test_the_joiner_purges_and_its_counters_stay(url, ledger):
    stream = classification(2500)
    model = "kept-for-a-while"
    instruments.register_model(model, VERSION, IDENTITY, "x", [LEVEL], "classification")
    before = metric("uq_labeled_predictions_total", model=model)
    record(ledger, stream, model=model)
    ledger.flush()
    ledger.add_labels(labels(stream, model=model))
    age(url, stream.ids[:2400], 100)
    joiner = Joiner(ledger, interval_s=0.01, retain_s=90 * DAY)
    joiner.start()
    until(lambda: entry(ledger)["served"] == 100)  # what is due is joined first
    joiner.stop()
    assert metric("uq_labeled_predictions_total", model=model) == before + 2500
    assert ledger.calibration()["feedback"][model]["joined"] == 2500
    assert entry(ledger)["labelled"] == 100


def test_without_retention_nothing_leaves(url, ledger):
    record(ledger, classification(3))
    ledger.flush()
    age(url, ["row-0", "row-1"], 10_000)
    assert not Joiner(ledger).tidy()
    assert entry(ledger)["served"] == 3


def test_upkeep_beside_a_service(url, ledger):
    stream = classification(2200)
    record(ledger, stream)
    ledger.flush()
    with opened(url) as found:
        # Which labels are accepted here are joined there.
        items = [*labels(stream, range(900)), LabelItem(None, "row-900", stream.label(900))]
        assert set(found.add_labels([*items, LabelItem(MODEL, "nobody", 1)])) == {
            "accepted",
            "pending",
        }
        assert len(join(ledger)) == 901
        info = found.info()
        assert (info["predictions"], info["images"], info["labels"]) == (2200, 0, 902)
        assert (info["joined"], info["pending"], info["revision"]) == (901, 1, migrations.HEAD)
        assert info["bytes"] > 2200 * 28 and info["newest"] >= info["oldest"] > time.time() - 600
        assert [(m["model"], m["predictions"]) for m in info["models"]] == [(MODEL, 2200)]
        assert found.forget(["row-0", "none"]) == {"row-0": 1, "none": 0}
        assert found.forget(["row-1"], "another") == {"row-1": 0}
        age(url, stream.ids[:2101], 100)
        age(url, ["nobody"], 100, labels_table)
        told: list[int] = []
        assert found.purge(90 * DAY, told.append) == (2100, 1)
        assert told[-1] == 2101 and len(told) == 3
    assert entry(ledger)["served"] == 99
