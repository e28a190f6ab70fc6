"""Bundles beside a ledger: all versions of a root, new ones too, and none that is another's."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest

from calibration.bundle import load_bundle
from calibration.drift import risk_monitor
from posthoc.contract import BundleError
from service.monitor.promises import promises_of
from service.monitor.shelf import Shelf
from service.rows import Source
from tests.factory import version_of


def sources(*folders):
    found = []
    for folder in folders:
        b = load_bundle(folder)
        found.append(Source(b.manifest.name, b.manifest.version, b.identity, b.manifest.task))
    return found


def test_every_version_of_a_root_that_the_ledger_has_met(classifier, tmp_path):
    root = tmp_path / "root"
    one = version_of(classifier, root, "m", "1")
    two = version_of(classifier, root, "m", "2")
    other = version_of(classifier, root, "other", "1")
    shelf = Shelf(root)
    assert set(shelf.promises(sources(one, two), {})) == {("m", "1"), ("m", "2")}
    found = shelf.promises(sources(one, two, other), {})
    b = load_bundle(two)
    assert found["m", "2"] == promises_of(b.manifest, b.identity)
    # One that comes later is found; one that is gone is still known.
    three = version_of(classifier, root, "m", "3")
    known = sources(one, three)
    shutil.rmtree(one)
    assert set(shelf.promises(known, {})) == {("m", "1"), ("m", "3")}


def test_one_bundle(classifier):
    b = load_bundle(classifier)
    assert set(Shelf(classifier).promises(sources(classifier), {})) == {
        ("tiny", b.manifest.version)
    }


def test_another_bundle_of_the_same_version_is_left_out_and_said_once(
    classifier, other_classifier, tmp_path, caplog
):
    mine = version_of(classifier, tmp_path / "a", "m", "1")
    theirs = version_of(other_classifier, tmp_path / "b", "m", "1")
    shelf = Shelf(tmp_path / "a")
    with caplog.at_level(logging.WARNING, "hedged.monitor"):
        for _ in range(2):
            assert shelf.promises(sources(theirs), {}) == {}
    assert [r.message for r in caplog.records] == [
        f"{mine} is not the bundle that predicted as m 1: what it promises is not watched"
    ]
    # The ledger's latest decides, but what was counted may be another's.
    counted = {("m", "1"): {"0.9": risk_monitor.update(risk_monitor.start(0.9, 0.05), 100, 88)}}
    (found,) = shelf.promises(sources(theirs, mine), counted).values()
    assert found.levels["0.9"].n == 0


def test_coverage_that_was_counted_counts(classifier):
    """The evidence is that of the same labels one by one."""
    b = load_bundle(classifier)
    hits = np.random.default_rng(0).random(400) < 0.7
    counted, _ = risk_monitor.run(risk_monitor.start(0.9, 0.05), hits)
    key = ("tiny", b.manifest.version)
    found = Shelf(classifier).promises(sources(classifier), {key: {"0.9": counted}})[key]
    want, _ = risk_monitor.run(promises_of(b.manifest, b.identity).levels["0.9"], hits)
    assert (found.levels["0.9"].n, found.levels["0.9"].covered) == (400, int(hits.sum()))
    assert found.levels["0.9"].log10_evidence == pytest.approx(want.log10_evidence)
    assert found.levels["0.9"].alarm and want.alarm
    assert found.levels["0.95"].n == 0
    assert found.accuracy is not None and found.accuracy.n == 0


def test_what_cannot_be_read_is_said_and_the_others_are_watched(classifier, tmp_path, caplog):
    root = tmp_path / "root"
    one = version_of(classifier, root, "m", "1")
    shelf = Shelf(root)
    broken = version_of(classifier, root, "m", "2") / "manifest.json"
    broken.write_text("{")
    with caplog.at_level(logging.WARNING, "hedged.monitor"):
        assert set(shelf.promises(sources(one), {})) == {("m", "1")}
        assert set(shelf.promises(sources(one), {})) == {("m", "1")}
    (record,) = caplog.records
    assert "manifest.json" in record.message
    (root / "m" / "1").rename(root / "m" / "9")  # a place that says another version
    shutil.rmtree(root / "m" / "2")
    with pytest.raises(BundleError, match="rename the folder"):
        Shelf(root)
    for nothing in (tmp_path / "none", tmp_path):
        with pytest.raises(BundleError):
            Shelf(nothing)
