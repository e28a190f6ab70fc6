"""Labels by name where versions differ in their classes: the one that predicted reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from service.feedback import parse_labels
from service.labels import LabelItem
from service.ledger import Ledger
from tests.service.ledger.helpers import join, until

OLD, NEW = ("bird", "cat", "dog"), ("ant", "bird", "cat", "cow")


def predict(ledger: Ledger, version: str, id: str) -> None:
    """One row of a version: it says class 1, and its set holds nothing else."""
    c = len(OLD if version == "1" else NEW)
    one = np.eye(c)[[1]]
    fields = {
        "label": np.array([1]),
        "probs": (0.9 * one + 0.1 / c).astype(np.float32),
        "confidence": np.array([0.9], np.float32),
        "set": one.astype(bool),
    }
    ledger.record("m", version, version * 64, [id], fields, "0.9")
    ledger.flush()


@pytest.fixture
def two(ledger):
    """A ledger of two versions; the second is the one that is served now."""
    ledger.register("m", "1", "1" * 64, task="classification", classes=OLD)
    predict(ledger, "1", "old")
    ledger.register("m", "2", "2" * 64, task="classification", classes=NEW)
    predict(ledger, "2", "new")
    return ledger


def send(ledger: Ledger, *labels: tuple[str, object]) -> list[str]:
    body = json.dumps([{"id": id, "label": label} for id, label in labels]).encode()
    items, _ = parse_labels(body, "application/json", lambda _: "m", 10, 1000)
    return ledger.add_labels(items)


def test_a_name_means_what_the_version_that_predicted_says(two):
    assert send(two, ("old", "cat"), ("new", "bird")) == ["accepted"] * 2
    assert send(two, ("old", 1), ("old", "bird"), ("new", 2)) == [
        "duplicate",
        "conflict",
        "conflict",
    ]
    assert {row.version: row.value for row in join(two)} == {"1": 1, "2": 1}
    assert [m["accuracy"] for m in two.calibration()["models"]] == [1, 1]


def test_a_name_unknown_to_the_version_that_predicted_is_invalid(two):
    assert send(two, ("old", "ant"), ("old", 3), ("new", "dog")) == ["invalid"] * 3
    assert send(two, ("new", "ant"), ("old", "dog")) == ["accepted"] * 2


def test_before_its_prediction_a_label_waits_if_any_version_can_read_it(two):
    early = [("later", "dog"), ("latest", "cow"), ("never", "horse"), ("nobody", 4)]
    assert send(two, *early) == ["pending", "pending", "invalid", "invalid"]
    assert send(two, ("later", "dog"), ("later", "cat")) == ["duplicate", "conflict"]
    predict(two, "1", "later")
    predict(two, "1", "latest")  # which has no cow
    assert send(two, ("later", 2)) == ["duplicate"]
    rows = []
    until(lambda: bool(rows.extend(join(two))) or len(rows) == 1)
    assert [row.value for row in rows] == [2]
    until(lambda: join(two) == [] and "waiting" not in two.calibration()["feedback"]["m"])
    assert [m["labelled"] for m in two.calibration()["models"]] == [1, 0]


def test_a_boolean_is_no_label(two):
    assert two.add_labels([LabelItem("m", "old", True)]) == ["invalid"]
