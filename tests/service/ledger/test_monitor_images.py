"""Images in a ledger that is watched: summaries, each read once, beside rows of other bundles."""

from __future__ import annotations

import numpy as np
import pytest

from service.images import summarised, summary
from service.monitor import following
from service.monitor.fields import served_streams
from service.monitor.following import Cursor, predictions_after
from service.upkeep import opened
from tests.service.ledger.helpers import record
from tests.service.streams import IDENTITY, LEVEL, classification

KEY = ("maps", "3")
NOTHING = Cursor()


def maps(n, seed=0):
    """Fields of n segmented images of 4×5 pixels, as a dense predictor gives them."""
    rng = np.random.default_rng(seed)
    return {
        "confidence": rng.random((n, 4, 5), np.float32),
        "entropy": rng.random((n, 4, 5), np.float32),
        "set_size": rng.integers(0, 4, (n, 4, 5)),
        "ood": rng.random((n, 4, 5)) < 0.2,
        "abstain": rng.random((n, 4, 5)) < 0.4,
        "ood_pvalue": rng.random((n, 4, 5), np.float32),
    }


def written(ledger, n, seed=0, *, task="classification", fields=None, version=KEY[1]):
    """What the service writes of n images; their ids say the order."""
    ids = [f"scan-{version}-{seed}-{k}" for k in range(n)]
    found = summary(task, fields or maps(n, seed), ids)
    assert ledger.record_images(KEY[0], version, IDENTITY, ids, found, LEVEL)
    assert ledger.flush()
    return found


def read(url, cursor=NOTHING, until=2.0**40):
    """(all that is new, by bundle, joined in its order; the cursor behind it)."""
    pages = []
    with opened(url) as ledger:
        while True:
            with ledger.reading() as conn:
                found, new = predictions_after(conn, cursor, until)
            if new == cursor:
                break
            pages, cursor = pages + found, new
    return pages, cursor


def joined(pages, key):
    """The streams of one bundle, its pages one after another."""
    of = [p for p in pages if (p.source.model, p.source.version) == key]
    streams = [served_streams(p) for p in of]
    return {name: np.concatenate([s[name] for s in streams]) for name in streams[0]}


def arrived(streams, first):
    """Which image each of the read ones is: within one write PostgreSQL has them in any order."""
    where = {value: k for k, value in enumerate(first["entropy"].tolist())}
    assert len(where) == len(first["entropy"])
    return np.array([where[value] for value in streams["entropy"].tolist()])


@pytest.mark.parametrize("size", [5000, 7])
def test_images_are_read_once_as_their_summaries(url, ledger, monkeypatch, size):
    monkeypatch.setattr(following, "PAGE", size)
    first = written(ledger, 30)
    pages, cursor = read(url)
    assert all(p.source.images and p.probs is None for p in pages)
    assert max(len(p.time) for p in pages) == min(size, 30)
    streams = joined(pages, KEY)
    assert set(streams) == set(summarised("classification")) == set(first)
    order = arrived(streams, first)
    for name, values in first.items():
        np.testing.assert_array_equal(streams[name], values[order])
    if url.startswith("sqlite") or "://" not in url:
        assert order.tolist() == list(range(30))
    second = written(ledger, 5, seed=1)
    pages, after = read(url, cursor)
    assert sorted(joined(pages, KEY)["entropy"]) == sorted(second["entropy"])
    assert after.prediction == cursor.prediction == 0
    assert read(url, after) == ([], after)


def test_images_and_rows_are_followed_side_by_side(url, ledger):
    stream = classification(40)
    record(ledger, stream)
    of_maps = written(ledger, 20)
    std = np.random.default_rng(0).random((6, 1, 3, 3), np.float32)
    spread = written(ledger, 6, task="regression", fields={"std": std}, version="4")
    pages, cursor = read(url)
    found = sorted((p.source.model, p.source.version, p.source.images, len(p.time)) for p in pages)
    assert found == [("m", "1", False, 40), ("maps", "3", True, 20), ("maps", "4", True, 6)]
    assert joined(pages, ("m", "1"))["confidence"].sum() == pytest.approx(
        stream.fields["confidence"].sum(dtype=np.float64)
    )
    assert "ood" not in joined(pages, ("m", "1"))  # of a row it is one of two answers
    assert np.sort(joined(pages, KEY)["ood"]).tolist() == np.sort(of_maps["ood"]).tolist()
    theirs = joined(pages, (KEY[0], "4"))
    assert list(theirs) == ["std"] and sorted(theirs["std"]) == sorted(spread["std"])
    # A cursor that was saved before images were followed begins with the first of them.
    old = Cursor(**{"prediction": cursor.prediction, "joined": 0.0, "label": 0})
    pages, _ = read(url, old)
    assert sum(len(p.time) for p in pages) == 26
    assert all(p.source.images for p in pages)


def test_young_images_wait_for_those_that_may_come_before_them(url, ledger):
    written(ledger, 4)
    pages, _ = read(url)
    assert read(url, until=pages[0].time.max() - 1) == ([], NOTHING)
