"""Labelled predictions of one bundle, read from a real SQLite file and a real PostgreSQL server."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from calibration.bundle import Bundle, load_bundle
from calibration.renew.rows import id_keys
from service import store
from service.fresh import fresh
from service.labels import LabelItem
from service.schema import LedgerError
from service.upkeep import opened
from tests.factory import version_of
from tests.service.ledger.helpers import join
from tests.service.streams import classification, regression


@pytest.fixture(scope="module")
def bundles(
    classification_bundle: Path, regression_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Bundle]:
    """A bundle of three classes and one of a regression, both called m."""
    root = tmp_path_factory.mktemp("fresh")
    return tuple(  # type: ignore[return-value]
        load_bundle(version_of(bundle, root / kind, "m", "1"))
        for kind, bundle in (("c", classification_bundle), ("r", regression_bundle))
    )


def serve(ledger, bundle, stream, rows, group=None, width=3):
    m = bundle.manifest
    ids = [stream.ids[i] for i in rows]
    ledger.register(m.name, m.version, bundle.identity, task=m.task, width=width, classes=m.classes)
    ledger.record(m.name, m.version, bundle.identity, ids, stream.rows(rows), "0.9", group)
    assert ledger.flush()


def test_rows_are_what_was_served_and_said(url, ledger, bundles):
    bundle, n = bundles[0], 2500  # more than two pages
    stream = classification(n, classes=3)
    serve(ledger, bundle, stream, list(range(n)), np.arange(n) % 5)
    known = list(range(0, n, 2))
    ledger.add_labels([LabelItem("m", stream.ids[i], stream.label(i)) for i in known])
    seen = []
    rows, window = fresh(url, bundle, 0.0, tell=seen.append)
    assert (len(rows), window.labelled, window.served, window.unfit) == (1250, 1250, n, 0)
    assert seen == [1000, 1250]
    order = np.argsort(rows.keys)
    keys = id_keys([stream.ids[i] for i in known])
    want = np.asarray(known)[np.argsort(keys)]
    np.testing.assert_array_equal(rows.keys[order], np.sort(keys))
    np.testing.assert_array_equal(rows.y[order], stream.y[want])
    np.testing.assert_array_equal(rows.group[order], want % 5)
    for name in ("label", "probs", "confidence"):
        np.testing.assert_array_equal(getattr(rows, name)[order], stream.fields[name][want])
    confidence = stream.fields["confidence"].astype(float)
    for name, served, labelled in window.by_confidence:
        edge = float(name)
        inside = (confidence > edge - 0.05 + 1e-12) & (confidence <= edge)
        assert (served, labelled) == (inside.sum(), inside[known].sum())
    # A joiner that has counted them changes nothing.
    assert len(join(ledger)) == 1250
    again, _ = fresh(url, bundle, 0.0)
    np.testing.assert_array_equal(np.sort(again.keys), np.sort(rows.keys))


def test_a_regression_has_its_means_and_deviations(url, ledger, bundles):
    stream = regression(300, outputs=2)
    serve(ledger, bundles[1], stream, list(range(300)), width=2)
    ledger.add_labels([LabelItem("m", i, stream.label(k)) for k, i in enumerate(stream.ids)])
    rows, window = fresh(url, bundles[1], 0.0)
    order, want = np.argsort(rows.keys), np.argsort(id_keys(stream.ids))
    np.testing.assert_array_equal(rows.y[order], stream.y[want])
    np.testing.assert_array_equal(rows.mean[order], stream.fields["mean"][want])
    np.testing.assert_array_equal(rows.std[order], stream.fields["std"][want])
    assert (rows.group == -1).all() and rows.probs is None
    assert window.by_confidence == ()


def test_only_this_bundle_and_only_since(url, ledger, bundles):
    bundle = bundles[0]
    stream = classification(60, classes=3)
    serve(ledger, bundle, stream, list(range(20)))
    middle = time.time()
    serve(ledger, bundle, stream, list(range(20, 40)))
    ids, fields = stream.ids[40:], stream.rows(slice(40, 60))
    ledger.record("m", "1", "f" * 64, ids, fields, "0.9")  # another identity
    ledger.record("n", "1", bundle.identity, ids, fields, "0.9")  # another name
    ledger.flush()
    ledger.add_labels([LabelItem("m", i, stream.label(k)) for k, i in enumerate(stream.ids)])
    rows, window = fresh(url, bundle, middle)
    assert sorted(rows.keys) == sorted(id_keys(stream.ids[20:40]))
    assert (window.since, window.served, window.labelled) == (middle, 20, 20)
    assert window.until >= middle
    every, _ = fresh(url, bundle, 0.0)
    assert sorted(every.keys[every.time < middle]) == sorted(id_keys(stream.ids[:20]))
    assert len(every) == 40 and every.time.max() <= window.until
    nothing, window = fresh(url, bundle, time.time() + 60)
    assert (len(nothing), window.served) == (0, 0)


def test_a_label_that_came_first_is_read_by_its_bundle(url, ledger, bundles):
    bundle = bundles[0]
    stream = classification(4, classes=3)
    # Nobody knows the model yet: two of these will mean something.
    ledger.add_labels([LabelItem("m", f"row-{i}", v) for i, v in enumerate(["c", 1, "zebra", 7])])
    serve(ledger, bundle, stream, list(range(4)))
    rows, window = fresh(url, bundle, 0.0)
    assert sorted(rows.y.tolist()) == [1, 2]
    assert (window.labelled, window.unfit, window.served) == (2, 2, 4)


def test_many_rows_are_a_sample_by_their_ids(url, ledger, bundles, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 100)
    bundle = bundles[0]
    stream = classification(1000, classes=3)
    serve(ledger, bundle, stream, list(range(1000)))
    ledger.add_labels([LabelItem("m", i, stream.label(k)) for k, i in enumerate(stream.ids)])
    rows, window = fresh(url, bundle, 0.0, most=150)
    assert len(rows) == 150 and window.labelled == 1000
    assert len(np.unique(rows.keys)) == 150
    whole, _ = fresh(url, bundle, 0.0, most=1000)
    smaller, _ = fresh(url, bundle, 0.0, most=60)
    assert set(smaller.keys) < set(rows.keys) < set(whole.keys)
    # By time it is no part of them: the first half of the ids has about half of the sample.
    early = np.isin(rows.keys, id_keys(stream.ids[:500])).sum()
    assert 50 < early < 100


def test_a_ledger_without_the_bundle_says_what_it_has(url, ledger, bundles, tmp_path):
    with pytest.raises(LedgerError, match=r"no predictions of m 1 \(.*it has none at all"):
        fresh(url, bundles[0], 0.0)
    serve(ledger, bundles[1], regression(5), list(range(5)))
    with pytest.raises(LedgerError, match=r"it has m 1 \(.{12}…\): give the bundle that made them"):
        fresh(url, bundles[0], 0.0)
    with pytest.raises(LedgerError, match="no such ledger"):
        fresh(tmp_path / "none.sqlite", bundles[0], 0.0)


def test_too_many_classes_have_no_probabilities(url, ledger, bundles):
    stream = classification(5, classes=1001)
    stream.y[:] = 1
    serve(ledger, bundles[0], stream, list(range(5)))
    ledger.add_labels([LabelItem("m", i, 1) for i in stream.ids])
    rows, _ = fresh(url, bundles[0], 0.0)
    assert len(rows) == 5 and rows.probs is None


def test_a_service_writes_on_meanwhile(url, ledger, bundles, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 50)
    bundle = bundles[0]
    stream = classification(400, classes=3)
    serve(ledger, bundle, stream, list(range(200)))
    ledger.add_labels([LabelItem("m", i, stream.label(k)) for k, i in enumerate(stream.ids[:200])])

    def meanwhile(read):
        if read == 50:
            serve(ledger, bundle, stream, list(range(200, 400)))
            join(ledger)

    rows, _ = fresh(url, bundle, 0.0, tell=meanwhile)
    assert len(rows) == 200
    with opened(url) as found:
        assert found.info()["predictions"] == 400
