"""``hedged monitor`` on a ledger that is written to meanwhile, as a process that is scraped."""

from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from calibration.bundle import load_bundle
from calibration.predictor import Predictor
from service.labels import LabelItem
from service.ledger import Ledger
from service.monitor.run import monitoring
from service.monitor.stream import Options
from tests.factory import rows
from tests.hedged.conftest import Call, assert_one_line
from tests.service.ledger.helpers import join, record, until
from tests.service.streams import MODEL, VERSION, Exposition, classification

LABELS = {"model": MODEL, "version": VERSION}
STREAM = classification(1300)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of 1,000 predictions that are a minute old."""
    path = tmp_path / "ledger.sqlite"
    add(path, range(1000))
    return path


def add(path: Path, rows: range) -> None:
    ledger = Ledger.open(path)
    record(ledger, STREAM, rows)
    ledger.close()
    # As if a minute had passed: what is younger than the lag is not read yet.
    with sqlite3.connect(path) as conn:
        conn.execute("UPDATE predictions SET time = time - 60 WHERE time > ?", (time.time() - 30,))


def command(path: Path | str, state: Path, *more: str) -> list[str]:
    begin = [sys.executable, "-m", "hedged", "monitor", str(path), "--state", str(state)]
    return [*begin, "--reference", "500", *more]


def test_once_says_what_is_there(path: Path, tmp_path: Path, call: Call) -> None:
    state = tmp_path / "state.json"
    options = ("--state", state, "--reference", 500, "--once")
    found = call("monitor", path, *options, "--json")
    assert found.code == 0, found.err
    streams = {row["stream"]: row for row in found.json["streams"]}
    assert set(streams) == {"confidence", "entropy", "set_size", "ood_pvalue", "label"}
    for row in streams.values():
        assert (row["model"], row["version"]) == (MODEL, VERSION)
        assert (row["reference"], row["seen"], row["learning"]) == (500, 500, False)
        assert row["changes"] == 0
        assert row["log10_martingale"] < 2
    again = call("monitor", path, *options)
    assert again.code == 0 and "entropy" in again.out
    assert_one_line(call("monitor", path, "--state", state, "--once"), "another --state")
    other = ("--state", tmp_path / "other.json")
    assert_one_line(call("monitor", tmp_path / "none.sqlite", *other), "no such ledger")
    assert not list(tmp_path.glob("other.json*"))
    assert call("monitor", path, "--json").code == 2
    assert call("monitor", path, "--window", "tomorrow").code == 2


def test_a_process_publishes_goes_on_after_a_restart_and_ends_on_a_signal(
    path: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"
    url = f"sqlite://me:secret@/{path}"
    for more, seen, ledger in ((None, 1000, str(path)), (range(1000, 1300), 1300, url)):
        started = command(ledger, state, "--port", "0", "--every", "0.2")
        with subprocess.Popen(started, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                line = process.stderr.readline()
                found = re.search(r"http://\S+/metrics", line)
                assert found is not None and "secret" not in line
                if more is not None:
                    has_read(found[0], 1000)  # what the last process had
                    add(path, more)
                has_read(found[0], seen)
                x = Exposition(httpx.get(found[0]).text)
                assert x.total("uq_changepoints_total", stream="confidence", **LABELS) == 0
                assert x.total("uq_drift_martingale_log10", stream="confidence", **LABELS) < 2
                second = subprocess.run(
                    command(path, state, "--once"), capture_output=True, text=True, check=False
                )
                assert second.returncode == 1 and "another hedged monitor" in second.stderr
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
            finally:
                process.kill()


@pytest.fixture(scope="module")
def labelled(classification_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of 1,500 answers of a bundle; of the first 500 labels were read by a monitor without
    the bundle, with its state beside it; the other labels are wrong every third time."""
    path = tmp_path_factory.mktemp("labelled") / "ledger.sqlite"
    x, y = rows("classification", 1500, 31)
    y = np.where((np.arange(1500) % 3 == 0) & (np.arange(1500) >= 500), (y + 1) % 3, y)
    fields = Predictor(classification_bundle).run({"x": x})
    ids = [f"row-{i}" for i in range(1500)]
    bundle = load_bundle(classification_bundle)
    ledger = Ledger.open(path)
    ledger.record("tiny", bundle.manifest.version, bundle.identity, ids, fields, "0.9")
    for part in (range(500), range(500, 1500)):
        ledger.add_labels([LabelItem("tiny", ids[i], int(y[i])) for i in part])
        ledger.flush()
        join(ledger)
        if part.start == 0:
            options = Options(reference=500)
            state = path.with_name("state.json")
            with monitoring(str(path), options, state, window_s=3600, lag_s=0) as found:
                until(lambda: bool(found.catch_up()))
                assert found.watch.coverage["tiny", bundle.manifest.version]["0.9"].n == 500
    ledger.close()
    return path


def test_labels_are_held_against_what_the_bundle_promised(
    labelled: Path, classification_bundle: Path, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    state = labelled.with_name("state.json")
    options = ("--state", state, "--reference", 500, "--lag", 0, "--once")
    bundles = ("--bundles", classification_bundle)
    found = call("monitor", labelled, *options, *bundles, "--json")
    assert found.code == 0, found.err
    said = "of the 500 labels that were read before coverage counts all"
    assert said in caplog.text
    caplog.clear()
    (coverage,) = found.json["coverage"]
    assert (coverage["level"], coverage["labelled"]) == ("0.9", 1500)
    assert coverage["promised"]["labelled"] == 1500
    assert coverage["promised"]["held"] == coverage["covered"]
    assert coverage["promised"]["alarm"]
    assert coverage["upper"] < coverage["promised"]["floor"]
    window = coverage["window"]
    assert window["labelled"] == 1500 and window["coverage"] < window["least"] < 0.9
    (accuracy,) = found.json["accuracy"]
    assert (accuracy["served"], accuracy["labelled"]) == (1500, 1500)
    assert accuracy["promised"]["labelled"] == 1000 and accuracy["promised"]["alarm"]
    raw, served = accuracy["bias"]["raw"], accuracy["bias"]["stratified"]
    assert raw["value"] == pytest.approx(accuracy["expected"] - accuracy["accuracy"], abs=1e-6)
    assert served["value"] == pytest.approx(raw["value"], abs=1e-6)  # every row has a label
    assert raw["lower"] > 0.05
    assert set(found.json["assumes"]) == {"expected", "stratified", "kinds"}
    (kind,) = found.json["kinds"]
    assert (kind["kind"], kind["rows"]) == ("none", 1000)  # only labels are spoilt
    table = call("monitor", labelled, *options)  # they go on without the bundle
    assert table.code == 0 and said not in caplog.text
    words = " ".join(table.out.split())
    assert "promised" in words and "yes" in words and "looks like" in words
    assert "Expected accuracy is right only where confidence is still calibrated" in words
    assert_one_line(call("monitor", labelled, *options, "--bundles", labelled), "no such folder")


def has_read(url: str, rows: int) -> None:
    def read() -> float:
        found = Exposition(httpx.get(url).text).values("uq_monitor_rows_total", **LABELS)
        return sum(found.values())  # no series before the first look

    until(lambda: read() == rows)
