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
import pytest

from service.ledger import Ledger
from tests.hedged.conftest import Call, assert_one_line
from tests.service.ledger.helpers import record, until
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


def command(path: Path, state: Path, *more: str) -> list[str]:
    begin = [sys.executable, "-m", "hedged", "monitor", str(path), "--state", str(state)]
    return [*begin, "--reference", "500", *more]


def test_once_says_what_is_there(path: Path, tmp_path: Path, call: Call) -> None:
    state = tmp_path / "state.json"
    options = ("--state", state, "--reference", 500, "--once")
    found = call("monitor", path, *options, "--json")
    assert found.code == 0, found.err
    rows = {row["stream"]: row for row in found.json["streams"]}
    assert set(rows) == {"confidence", "entropy", "set_size", "ood_pvalue", "label"}
    for row in rows.values():
        assert (row["model"], row["version"]) == (MODEL, VERSION)
        assert (row["reference"], row["seen"], row["learning"]) == (500, 500, False)
        assert row["changes"] == 0
        assert row["log10_martingale"] < 2
    again = call("monitor", path, *options)
    assert again.code == 0 and "entropy" in again.out
    assert_one_line(call("monitor", path, "--state", state, "--once"), "another --state")
    assert_one_line(call("monitor", tmp_path / "none.sqlite", *options), "no such ledger")
    assert call("monitor", path, "--json").code == 2
    assert call("monitor", path, "--window", "tomorrow").code == 2


def test_a_process_publishes_goes_on_after_a_restart_and_ends_on_a_signal(
    path: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"
    for rows, seen in ((None, 1000), (range(1000, 1300), 1300)):
        started = command(path, state, "--port", "0", "--every", "0.2")
        with subprocess.Popen(started, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                found = re.search(r"http://\S+/metrics", process.stderr.readline())
                assert found is not None
                if rows is not None:
                    has_read(found[0], 1000)  # what the last process had
                    add(path, rows)
                has_read(found[0], seen)
                x = Exposition(httpx.get(found[0]).text)
                assert x.total("uq_changepoints_total", stream="confidence", **LABELS) == 0
                assert x.total("uq_drift_martingale_log10", stream="confidence", **LABELS) < 2
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
            finally:
                process.kill()


def has_read(url: str, rows: int) -> None:
    def read() -> float:
        found = Exposition(httpx.get(url).text).values("uq_monitor_rows_total", **LABELS)
        return sum(found.values())  # no series before the first look

    until(lambda: read() == rows)
