"""A ledger that is watched: every row once, whenever one looks, and after a restart."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from posthoc.contract import DataError
from service.labels import totals_of
from service.monitor import following
from service.monitor.following import Cursor
from service.monitor.publish import Publisher, registry
from service.monitor.stream import Options
from service.monitor.watch import Watch, look, restore, save, windowed
from service.upkeep import opened
from tests.service.ledger.helpers import join, labels, record
from tests.service.streams import (
    MODEL,
    VERSION,
    Exposition,
    by_definition,
    classification,
    regression,
)

OPTIONS = Options(reference=500, window=200)
KEY = (MODEL, VERSION)


def looked(url, state=None, *, ahead=60.0):
    """The watch after everything that a clock ``ahead`` of this one lets be read."""
    state = state or Watch()
    with opened(url) as ledger:
        while True:
            with ledger.reading() as conn:
                state, read = look(conn, state, OPTIONS, time.time() + ahead)
            if not read:
                return state


@pytest.fixture
def stream():
    return classification(1500)


def test_every_prediction_is_read_once_in_pages_of_any_size(url, ledger, stream, monkeypatch):
    record(ledger, stream, range(900))
    ledger.flush()
    whole = looked(url)
    monkeypatch.setattr(following, "PAGE", 70)
    paged = looked(url)
    assert paged.rows == whole.rows == {KEY: 900}
    assert paged.streams == whole.streams
    assert paged.samples[KEY].n == whole.samples[KEY].n == 900
    record(ledger, stream, range(900, 1500))
    ledger.flush()
    after = looked(url, paged)
    entropy = stream.fields["entropy"]
    assert after.samples[KEY].reliable == (entropy < 0.4 * np.log(7)).sum()
    assert after.rows == {KEY: 1500}
    assert after.streams[KEY]["confidence"].martingale.seen == 1000
    assert set(after.streams[KEY]) == {"confidence", "entropy", "set_size", "ood_pvalue", "label"}


def test_young_rows_wait_for_those_that_may_come_before_them(url, ledger, stream):
    record(ledger, stream, range(100))
    ledger.flush()
    assert looked(url, ahead=-60.0).rows == {}
    assert looked(url).rows == {KEY: 100}


def test_labels_are_read_once_and_add_up(url, ledger, stream, monkeypatch):
    record(ledger, stream)
    ledger.flush()
    monkeypatch.setattr(following, "PAGE", 64)
    state = looked(url)
    assert state.coverage == {}
    for part in (range(200), range(200, 1200)):
        ledger.add_labels(labels(stream, part))
        join(ledger, 37)
        state = looked(url, state)
    rows = list(range(1200))
    found = state.coverage[KEY]["0.9"]
    want = by_definition(stream, rows)
    assert (found.n, found.covered) == (1200, round(want["coverage"] * 1200))
    errors = state.streams[KEY]["error"]
    assert errors.martingale.seen == 1200 - OPTIONS.reference
    low, high = found.bounds(0.05)
    assert low < want["coverage"] < high
    assert looked(url, state) == state


def test_a_regression_has_its_own_streams(url, ledger):
    stream = regression(60)
    record(ledger, stream)
    ledger.add_labels(labels(stream))
    ledger.flush()
    join(ledger)
    state = looked(url)
    assert set(state.streams[KEY]) == {"std", "error", "pit"}
    ranks = stats.norm.cdf((stream.y - stream.fields["mean"]) / stream.fields["std"]).mean(axis=1)
    np.testing.assert_allclose(
        sorted(state.streams[KEY]["pit"].gathered), np.sort(ranks), atol=1e-6
    )
    wrong = np.abs(stream.fields["mean"] - stream.y).mean(axis=1)
    np.testing.assert_allclose(
        sorted(state.streams[KEY]["error"].gathered), np.sort(wrong), rtol=1e-6
    )
    spread = stream.fields["std"].mean(axis=1)
    np.testing.assert_allclose(
        sorted(state.streams[KEY]["std"].gathered), np.sort(spread), rtol=1e-6
    )


def test_a_watch_is_kept_whole_and_only_for_the_same_options(url, ledger, stream, tmp_path):
    record(ledger, stream, range(1000))
    ledger.add_labels(labels(stream, range(300)))
    ledger.flush()
    join(ledger)
    state, file = looked(url), tmp_path / "state.json"
    assert restore(file, OPTIONS) == Watch()
    save(state, OPTIONS, file)
    assert restore(file, OPTIONS) == state
    assert [p.name for p in tmp_path.glob("state*")] == ["state.json"]
    with pytest.raises(DataError, match="use these options again, or another --state"):
        restore(file, Options(reference=501))
    text = file.read_text()
    for damaged in (text[:-30], "[]", "{}", text.replace('"format": 1', '"format": 2')):
        file.write_text(damaged)
        with pytest.raises(DataError, match=r"state\.json"):
            restore(file, OPTIONS)


def test_what_is_published_is_what_was_found(url, ledger, stream):
    record(ledger, stream)
    ledger.add_labels(labels(stream, range(400)))
    ledger.flush()
    join(ledger)
    state, publisher = looked(url), Publisher()
    before = {name: counted(name) for name in ("uq_monitor_rows_total", "uq_sample_rows_total")}
    for _ in range(2):  # a counter moves once
        with opened(url) as there, there.reading() as conn:
            publisher.publish(state, windowed(conn, 3600.0))
    x = Exposition(text())
    labelled = {"model": MODEL, "version": VERSION}
    assert counted("uq_monitor_rows_total") - before["uq_monitor_rows_total"] == 1500
    # Every row counts once as "all"; of the reliable ones each that is not in the first batch is
    # compared.
    reliable = (stream.fields["entropy"] < 0.4 * np.log(7)).sum()
    of_kinds = counted("uq_sample_rows_total") - before["uq_sample_rows_total"]
    totals = state.samples[KEY]
    assert (totals.n, totals.reliable) == (1500, reliable)
    assert of_kinds == 1500 + reliable + totals.compared + totals.redundant
    bet = state.streams[KEY]["entropy"].martingale.log10_capital
    assert x.total("uq_drift_martingale_log10", stream="entropy", **labelled) == bet
    assert x.total("uq_changepoints_total", stream="entropy", **labelled) == 0
    assert x.total("uq_window_labels", **labelled) == 400
    (totals,) = totals_of(labelled_rows(url)).values()
    floor = x.total("uq_window_ece_ratio", bound="floor", **labelled)
    assert 0 < floor < 0.2
    assert x.total("uq_window_ece_ratio", bound="debiased", **labelled) <= totals.ece
    low, high = (
        x.total("uq_coverage_bound_ratio", level="0.9", bound=b, **labelled)
        for b in ("lower", "upper")
    )
    assert low < totals.levels["0.9"].coverage < high
    assert not x.values("uq_queue_rows")  # the service's own are not the monitor's to tell


def labelled_rows(url):
    with opened(url) as ledger, ledger.reading() as conn:
        return following.labels_after(conn, Cursor(), time.time() + 60)[0]


def counted(name):
    return sum(Exposition(text()).values(name).values())


def text():
    from prometheus_client import generate_latest

    return generate_latest(registry()).decode()
