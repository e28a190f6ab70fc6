"""A ledger that is watched: every row once, whenever one looks, and after a restart."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from calibration.drift import risk_monitor
from calibration.drift.shift_kind import KINDS
from posthoc.contract import DataError
from service.labels import totals_of
from service.monitor import following
from service.monitor.following import Cursor
from service.monitor.kinds import statement
from service.monitor.promises import Promises
from service.monitor.publish import Publisher, registry
from service.monitor.saved import restore, save
from service.monitor.stream import Options
from service.monitor.watch import Watch, look
from service.monitor.window import windowed
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


def looked(url, state=None, *, ahead=60.0, bundles=None):
    """The watch after everything that a clock ``ahead`` of this one lets be read."""
    state = state or Watch()
    with opened(url) as ledger:
        while True:
            with ledger.reading() as conn:
                state, read = look(conn, state, OPTIONS, time.time() + ahead, bundles or {})
            if not read:
                return state


@pytest.fixture
def stream():
    return classification(1500)


def test_what_ids_say_is_no_drift(url, ledger, stream):
    """Healthy rows in the order of chance, whose ids tell how sure the model is."""
    rank = np.argsort(np.argsort(stream.fields["confidence"]))
    stream = replace(stream, ids=[f"{i:05d}" for i in rank])
    for start in range(0, 1500, 250):
        record(ledger, stream, range(start, start + 250))
        ledger.flush()
    ledger.add_labels(labels(stream))
    join(ledger)
    found = looked(url)
    assert found.rows == {KEY: 1500}
    peaks = {n: s.martingale.log10_peak for n, s in found.streams[KEY].items() if s.martingale}
    assert {"confidence", "entropy", "error"} <= set(peaks)
    assert max(peaks.values()) < 2, peaks


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


def promised(identity="f"):
    """Of the stream, which covers about 0.86 and is right about 0.7 of the time."""
    return {
        KEY: Promises(
            identity,
            {"0.9": risk_monitor.watch_level(0.1, 500), "0.5": risk_monitor.watch_level(0.5, 500)},
            risk_monitor.watch_share(900, 1000),
            {"0.9": 500, "0.5": 500},
        )
    }


def test_promises_count_the_labels_that_come_after_they_are_known(url, ledger, stream, tmp_path):
    record(ledger, stream)
    ledger.add_labels(labels(stream, range(300)))
    ledger.flush()
    join(ledger)
    state = looked(url)
    assert state.promises == {}
    ledger.add_labels(labels(stream, range(300, 900)))
    join(ledger)
    state = looked(url, state, bundles=promised())
    later = by_definition(stream, list(range(300, 900)))
    found = state.promises[KEY]
    one = found.levels["0.9"]
    assert (one.n, one.covered) == (600, round(600 * later["coverage"]))
    assert found.levels["0.5"].n == 0  # a level that nobody asked for
    assert found.accuracy is not None
    assert (found.accuracy.n, found.accuracy.covered) == (600, round(600 * later["accuracy"]))
    # The same labels in one group: the evidence depends on their number alone.
    begin = promised()[KEY].accuracy
    assert found.accuracy.log10_evidence == pytest.approx(
        risk_monitor.update(begin, 600, found.accuracy.covered).log10_evidence
    )
    assert found.accuracy.alarm  # 0.7 is not 0.9
    # They go on without the bundles, and after a restart; another bundle begins anew.
    save(state, OPTIONS, tmp_path / "state.json")
    ledger.add_labels(labels(stream, range(900, 1000)))
    join(ledger)
    state = looked(url, restore(tmp_path / "state.json", OPTIONS))
    assert state.promises[KEY].levels["0.9"].n == 700
    assert looked(url, state, bundles=promised()).promises == state.promises
    again = looked(url, state, bundles=promised("e")).promises[KEY]
    assert (again.identity, again.levels["0.9"].n) == ("e", 0)


def test_a_file_from_before_promises_is_read(url, ledger, stream, tmp_path):
    record(ledger, stream, range(800))
    ledger.add_labels(labels(stream, range(300)))
    ledger.flush()
    join(ledger)
    state, file = looked(url), tmp_path / "state.json"
    save(state, OPTIONS, file)
    kept = json.loads(file.read_text())
    for model in kept["models"]:
        del model["promises"], model["kinds"]
    del kept["cursor"]["image"]
    file.write_text(json.dumps(kept | {"format": 1}))
    assert restore(file, OPTIONS) == replace(state, kinds={})


def test_a_watch_is_kept_whole_and_only_for_the_same_options(url, ledger, stream, tmp_path):
    record(ledger, stream, range(1000))
    ledger.add_labels(labels(stream, range(300)))
    ledger.flush()
    join(ledger)
    state, file = looked(url, bundles=promised()), tmp_path / "state.json"
    assert restore(file, OPTIONS) == Watch()
    save(state, OPTIONS, file)
    assert restore(file, OPTIONS) == state
    assert [p.name for p in tmp_path.glob("state*")] == ["state.json"]
    with pytest.raises(DataError, match="use these options again, or another --state"):
        restore(file, Options(reference=501))
    text = file.read_text()
    for damaged in (text[:-30], "[]", "{}", text.replace('"format": 2', '"format": 3')):
        file.write_text(damaged)
        with pytest.raises(DataError, match=r"state\.json"):
            restore(file, OPTIONS)


def test_what_is_published_is_what_was_found(url, ledger, stream):
    record(ledger, stream)
    ledger.add_labels(labels(stream, range(400)))
    ledger.flush()
    join(ledger)
    state, publisher = looked(url, bundles=promised()), Publisher()
    before = {name: counted(name) for name in ("uq_monitor_rows_total", "uq_sample_rows_total")}
    for _ in range(2):  # a counter moves once
        with opened(url) as there, there.reading() as conn:
            publisher.publish(state, OPTIONS, windowed(conn, 3600.0))
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
    one = state.promises[KEY].levels["0.9"]
    figures = ("floor_ratio", "evidence_log10", "alarm")
    of_level = [x.total(f"uq_coverage_{f}", level="0.9", **labelled) for f in figures]
    assert of_level == [one.floor, one.log10_evidence, one.alarm]
    one = state.promises[KEY].accuracy
    of_accuracy = [x.total(f"uq_accuracy_{f}", **labelled) for f in figures]
    assert of_accuracy == [one.floor, one.log10_evidence, 1.0]
    bias = {
        (dict(k)["kind"], dict(k)["bound"]): v
        for k, v in x.values("uq_expected_accuracy_bias_ratio", **labelled).items()
    }
    confidence = stream.fields["confidence"][:400].astype(float)
    right = stream.fields["label"][:400] == stream.y[:400]
    assert bias["raw", "value"] == pytest.approx((confidence - right).mean())
    assert bias["raw", "value"] > bias["raw", "chance"] > 0 < bias["raw", "lower"]  # too sure
    assert bias["stratified", "lower"] < bias["stratified", "value"] < bias["stratified", "upper"]
    assert ("stratified", "chance") not in bias
    kind = {dict(k)["kind"]: v for k, v in x.values("uq_shift_kind_info", **labelled).items()}
    shift = statement(state.kinds[KEY], OPTIONS)
    assert shift is not None
    assert kind == {name: float(name == shift.kind) for name in KINDS}
    strange = {
        dict(k)["bound"]: v for k, v in x.values("uq_shift_strange_ratio", **labelled).items()
    }
    assert strange == {"value": shift.strange, "lower": shift.low, "upper": shift.high}
    assert not x.values("uq_queue_rows")  # the service's own are not the monitor's to tell


def labelled_rows(url):
    with opened(url) as ledger, ledger.reading() as conn:
        return following.labels_after(conn, Cursor(), time.time() + 60)[0]


def counted(name):
    return sum(Exposition(text()).values(name).values())


def text():
    from prometheus_client import generate_latest

    return generate_latest(registry()).decode()
