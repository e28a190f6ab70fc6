"""Several processes at once, full queues, stores that go away, and crashes."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from service import instruments
from service.joiner import Joiner
from service.ledger import LedgerError
from service.rows import MAX_STORED_CLASSES, compact
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

ROOT = Path(__file__).parents[3]


def test_two_processes_worth_of_threads_never_claim_the_same_label(url, open_ledger):
    stream = classification(600)
    ledgers = [open_ledger(url) for _ in range(3)]
    record(ledgers[0], stream)
    ledgers[0].flush()
    ledgers[0].add_labels(labels(stream))
    claimed: list[list[float]] = [[], [], []]
    deadline = time.monotonic() + 60

    def run(k: int) -> None:
        while sum(map(len, claimed)) < 600 and time.monotonic() < deadline:
            claimed[k] += [r.confidence for r in ledgers[k].claim(7)]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(c for part in claimed for c in part) == sorted(
        stream.fields["confidence"].astype(float).tolist()
    )


def test_many_senders_of_one_label_store_it_once(url, open_ledger):
    stream = classification(200)
    ledgers = [open_ledger(url) for _ in range(3)]
    record(ledgers[0], stream)
    ledgers[0].flush()
    results: list[list[str]] = [[], [], []]

    def send(k: int) -> None:
        order = np.random.default_rng(k).permutation(200).tolist()
        for start in range(0, 200, 20):
            results[k] += ledgers[k].add_labels(labels(stream, order[start : start + 20]))

    threads = [threading.Thread(target=send, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    flat = [r for part in results for r in part]
    assert (flat.count("accepted"), flat.count("duplicate")) == (200, 400)


def test_a_full_queue_drops_and_counts(tmp_path, open_ledger):
    ledger = open_ledger(str(tmp_path / "l.sqlite"), max_queue_rows=100)
    stream = classification(150)
    before = metric("uq_ledger_dropped_total")
    assert record(ledger, stream, list(range(100)))
    assert not record(ledger, stream, list(range(150)))  # more than would ever fit
    assert metric("uq_ledger_dropped_total") == before + 150
    ledger.flush()
    assert record(ledger, stream, list(range(100, 150)))
    ledger.flush()
    assert entry(ledger)["served"] == 150


def test_one_wrong_batch_is_dropped_alone(tmp_path, open_ledger, caplog):
    ledger = open_ledger(str(tmp_path / "l.sqlite"))
    stream = classification(10)
    before = metric("uq_ledger_dropped_total")
    record(ledger, stream, [0, 1])
    ledger.record(MODEL, VERSION, IDENTITY, ["bad"], {"label": np.zeros(1)}, LEVEL)
    ledger.record(
        MODEL,
        VERSION,
        IDENTITY,
        ["nan"],
        stream.rows([2]) | {"confidence": np.array([np.nan])},
        LEVEL,
    )
    record(ledger, stream, [3])
    ledger.flush()
    assert entry(ledger)["served"] == 3
    assert metric("uq_ledger_dropped_total") == before + 2
    assert "no prediction" in caplog.text


def test_a_store_that_goes_away_loses_nothing(postgres, postgres_url, open_ledger):
    ledger = open_ledger(postgres_url)
    stream = classification(90)
    record(ledger, stream, list(range(30)))
    assert ledger.flush()
    assert set(ledger.add_labels(labels(stream, range(10)))) == {"accepted"}
    postgres.stop()
    assert record(ledger, stream, list(range(30, 60)))
    assert ledger.flush()
    assert ledger.spooling
    assert set(ledger.add_labels(labels(stream, range(5, 50)))) == {"spooled"}
    assert record(ledger, stream, list(range(60, 90)))
    with pytest.raises(LedgerError, match="away"):
        ledger.forget("row-1")
    with pytest.raises(LedgerError, match="cannot be read"):
        ledger.calibration()
    # A second process starts meanwhile, and is not stopped by that.
    other = open_ledger(postgres_url)
    other.register(MODEL, VERSION, IDENTITY, task="classification", width=7)
    assert record(other, classification(93), [90, 91, 92])
    assert other.flush()
    postgres.ensure_postgres_running()
    until(lambda: not ledger.spooling and not other.spooling)
    until(lambda: len(join(ledger)) == 0)
    found = entry(ledger)
    assert (found["served"], found["labelled"]) == (93, 50)
    expected = by_definition(stream, list(range(50)))
    assert found["brier"] == pytest.approx(expected["brier"])
    assert ledger.calibration()["feedback"][MODEL]["duplicate"] == 5


def test_a_process_killed_while_spooling_leaves_its_entries_to_the_next(
    postgres, postgres_url, tmp_path, open_ledger
):
    postgres.stop()
    code = (
        "import sys, os, signal\n"
        "from service.ledger import Ledger\n"
        "from tests.service.ledger.helpers import labels, record\n"
        "from tests.service.streams import classification\n"
        "ledger = Ledger.open(sys.argv[1], spool_dir=sys.argv[2])\n"
        "stream = classification(40)\n"
        "record(ledger, stream)\n"
        "ledger.flush()\n"
        "assert set(ledger.add_labels(labels(stream, range(9)))) == {'spooled'}\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, postgres_url, str(tmp_path / "spool")], cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    postgres.ensure_postgres_running()
    ledger = open_ledger(postgres_url)
    until(lambda: not ledger.spooling)
    join(ledger)
    found = entry(ledger)
    assert (found["served"], found["labelled"]) == (40, 9)


def test_a_locked_sqlite_file_spools_and_recovers(tmp_path, open_ledger, monkeypatch):
    monkeypatch.setattr("service.schema.BUSY_TIMEOUT_MS", 20)
    path = tmp_path / "l.sqlite"
    ledger = open_ledger(str(path))
    stream = classification(20)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    record(ledger, stream)
    assert ledger.flush()
    assert ledger.spooling
    assert set(ledger.add_labels(labels(stream))) == {"spooled"}
    blocker.execute("COMMIT")
    blocker.close()
    until(lambda: not ledger.spooling)
    assert len(join(ledger)) == 20
    assert entry(ledger)["ece"] == pytest.approx(by_definition(stream, list(range(20)))["ece"])


def test_everything_survives_a_restart(url, open_ledger):
    stream = classification(60)
    first = open_ledger(url)
    record(first, stream)
    first.add_labels(labels(stream, range(20)))
    first.close()  # writes what is queued
    second = open_ledger(url)
    until(lambda: bool(join(second)))
    second.add_labels(labels(stream, range(15, 40)))
    join(second)
    found = entry(second)
    assert (found["served"], found["labelled"]) == (60, 40)
    assert second.calibration()["feedback"][MODEL]["duplicate"] == 5


def test_the_joiner_thread_joins_and_stops(url, open_ledger):
    ledger = open_ledger(url)
    stream = regression(30)
    record(ledger, stream, model="joined-by-thread")
    ledger.flush()
    instruments.register_model("joined-by-thread", VERSION, IDENTITY, "x", [LEVEL], "regression")
    before = metric("uq_labeled_predictions_total", model="joined-by-thread")
    joiner = Joiner(ledger, interval_s=0.01, claim_rows=8)
    joiner.start()
    ledger.add_labels(labels(stream, model="joined-by-thread"))
    key = {"model": "joined-by-thread", "version": VERSION, "bin": "all"}
    until(lambda: metric("uq_labeled_predictions_total", **key) == before + 30)
    joiner.stop()
    assert ledger.calibration()["feedback"]["joined-by-thread"]["joined"] == 30


def test_labels_and_claims_reach_the_disk_before_they_are_answered(tmp_path, open_ledger):
    path = tmp_path / "l.sqlite"
    ledger = open_ledger(str(path))
    stream = classification(20)
    commits: list[tuple[set[str], str]] = []
    changed: set[str] = set()

    def executed(_conn, _cursor, statement, *_):
        verb, *words = statement.split()
        if verb in ("INSERT", "UPDATE", "DELETE"):
            changed.add(words[0] if verb == "UPDATE" else words[1])

    def committed(conn):
        level = conn.exec_driver_sql("PRAGMA synchronous").scalar()
        commits.append((set(changed), {1: "NORMAL", 2: "FULL"}[level]))
        changed.clear()

    listeners = (("after_cursor_execute", executed), ("commit", committed))
    for name, listener in listeners:
        sa.event.listen(sa.Engine, name, listener)
    try:
        ledger.register(MODEL, VERSION, IDENTITY, task="classification", width=7)
        record(ledger, stream)
        ledger.flush()
        ledger.add_labels(labels(stream))
        join(ledger)
        ledger.forget("row-0")
    finally:
        for name, listener in listeners:
            sa.event.remove(sa.Engine, name, listener)
    found = [(tables, level) for tables, level in commits if tables]
    assert found == [
        ({"bundles"}, "FULL"),
        ({"predictions"}, "NORMAL"),
        ({"labels", "feedback"}, "FULL"),
        ({"labels"}, "FULL"),
        ({"labels", "predictions", "images"}, "FULL"),
    ]


def test_the_queue_is_bounded_in_bytes(tmp_path, open_ledger):
    ledger = open_ledger(str(tmp_path / "l.sqlite"), max_queue_bytes=40_000)
    stream = classification(12, classes=1000)  # 4 kB of probs a row
    assert not record(ledger, stream)
    assert record(ledger, stream, list(range(6)))
    assert ledger.flush()
    assert record(ledger, stream, list(range(6, 12)))
    assert ledger.flush()
    assert entry(ledger)["served"] == 12


def test_what_waits_to_be_written_is_small_and_holds_no_batch():
    stream = classification(64, classes=MAX_STORED_CLASSES + 1)
    part = {k: v[3:5] for k, v in stream.fields.items()}
    kept, width = compact(part)
    assert width == MAX_STORED_CLASSES + 1
    assert "probs" not in kept
    assert kept["set"].shape == (2, 126)
    np.testing.assert_array_equal(np.unpackbits(kept["set"], axis=1, count=1001), part["set"])
    for name, value in kept.items():
        assert value.base is None, name
        assert not np.shares_memory(value, stream.fields[name])
    few = classification(4, classes=3)
    whole, _ = compact(few.fields)
    assert whole["probs"] is few.fields["probs"]  # its own array, nothing else is in it
    with pytest.raises(ValueError, match="probs"):
        compact({"probs": np.zeros(3)})
