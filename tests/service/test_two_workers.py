"""Real worker processes on one ledger: the counters of all of them equal numpy on the same rows."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.labels import LabelItem
from service.ledger import Ledger
from tests.service.streams import (
    LEVEL,
    MODEL,
    VERSION,
    Exposition,
    by_definition,
    classification,
    from_counters,
)
from tests.service.worker import record

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0


class Worker:
    """One worker process."""

    def __init__(self, folder: Path, rows: int, *, claim_rows: int = 50, die_after: int = 0):
        metrics = folder / "metrics"
        metrics.mkdir(exist_ok=True)
        args = (str(folder / "ledger.sqlite"), str(rows), str(claim_rows), str(die_after))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.service.worker", *args],
            cwd=ROOT,
            env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(metrics)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def ask(self, do: str, **arguments: Any) -> Any:
        self.send(do, **arguments)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker died during {do!r}"
        return json.loads(line)

    def end(self) -> int:
        if self.process.poll() is None and self.process.stdin is not None:
            self.process.stdin.close()
        code = self.process.wait(60)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)


@pytest.fixture
def spawn(tmp_path):
    workers: list[Worker] = []

    def start(rows: int, **options: int) -> Worker:
        workers.append(Worker(tmp_path, rows, **options))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()
        worker.end()


def test_two_workers_and_two_thousand_labels_equal_numpy(spawn):
    n, early = 2000, 200
    stream = classification(n)
    rng = np.random.default_rng(0)
    workers = [spawn(n), spawn(n)]
    pool = ThreadPoolExecutor(2)

    def both(do: str, name: str, parts: list[list[Any]], size: int = 50) -> list[Any]:
        """Both workers at once, each with its own part, in requests of ``size``."""

        def one(k: int) -> list[Any]:
            part = parts[k]
            chunks = [part[i : i + size] for i in range(0, len(part), size)]
            return [workers[k].ask(do, **{name: chunk}) for chunk in chunks]

        return [x for found in pool.map(one, (0, 1)) for x in found]

    def truth(rows: list[int]) -> list[Any]:
        return [[stream.ids[i], stream.label(i)] for i in rows]

    for worker in workers:
        worker.ask("start")
    order = rng.permutation(n).tolist()
    # Labels that come before their prediction, half of them at each worker.
    first = both("labels", "items", [truth(order[:100]), truth(order[100:early])])
    assert Counter(r for found in first for r in found) == {"pending": early}
    assert all(both("record", "rows", [list(range(0, n, 2)), list(range(1, n, 2))], 500))
    # The rest, and 300 of all labels a second time somewhere, in any order.
    again = rng.choice(n, 300, replace=False).tolist()
    rest = [*order[early:], *again]
    rng.shuffle(rest)
    results = both("labels", "items", [truth(rest[::2]), truth(rest[1::2])])
    counts = Counter(r for found in results for r in found)
    assert counts == {"accepted": n - early, "duplicate": 300}
    # Wrong ones: another label than before, ids that nobody predicted, labels that are no class.
    other = [[stream.ids[i], (stream.label(i) + 1) % 7] for i in order[:150]]
    assert set(workers[0].ask("labels", items=other)) == {"conflict"}
    strangers = [[f"stranger-{i}", 0] for i in range(40)]
    assert set(workers[1].ask("labels", items=strangers)) == {"pending"}
    bad = [[stream.ids[0], 7], [stream.ids[0], -1], [stream.ids[0], "cat"], ["no id", 1]]
    assert set(workers[0].ask("labels", items=bad)) == {"invalid"}

    deadline = time.monotonic() + DEADLINE_S
    while (found := workers[0].ask("calibration"))["feedback"][MODEL].get("joined", 0) < n:
        assert time.monotonic() < deadline, found["feedback"]
    assert found["feedback"][MODEL] == {
        "pending": early + 40,
        "accepted": n - early,
        "duplicate": 300,
        "conflict": 150,
        "invalid": 4,
        "joined": n,
        "waiting": 40,
    }
    expected = by_definition(stream, list(range(n)))
    deadline = time.monotonic() + DEADLINE_S
    while True:  # counters move after the commit that "joined" was read from
        text = workers[1].ask("render")
        got = from_counters(text, model=MODEL, version=VERSION)
        if got["n"] >= n:
            break
        assert time.monotonic() < deadline
    assert got["n"] == n
    for name in ("accuracy", "ece", "log_loss", "brier", "coverage"):
        assert got[name] == pytest.approx(expected[name], abs=1e-9), name
        entry = found["models"][0]
        from_ledger = entry["coverage"][LEVEL]["coverage"] if name == "coverage" else entry[name]
        assert from_ledger == pytest.approx(expected[name], abs=1e-9), name

    x = Exposition(text)
    feedback = x.values("uq_feedback_total", model=MODEL)
    assert {dict(k)["result"]: v for k, v in feedback.items()} == {
        "accepted": n - early,
        "pending": early + 40,
        "duplicate": 300,
        "conflict": 150,
        "invalid": 4,
        "spooled": 0,
        "joined": n,
        "expired": 0,
    }
    assert x.total("uq_feedback_delay_seconds_count", model=MODEL) == n
    labels = {"model": MODEL, "version": VERSION}
    abstained = int(stream.fields["abstain"].sum())
    assert x.total("uq_predictions_total", outcome="abstained", **labels) == abstained
    assert x.total("uq_predictions_total", outcome="answered", **labels) == n - abstained
    assert x.total("uq_expected_correct_total", **labels) == pytest.approx(
        math.fsum(map(float, stream.fields["confidence"])), abs=1e-9 * n
    )

    # A killed worker takes none of its counts with it, and its live gauges do not stay.
    for worker in workers:
        worker.ask("queue", rows=3)
    assert Exposition(workers[1].ask("render")).total("uq_queue_rows") == 6
    workers[0].kill()
    text = workers[1].ask("render")
    assert from_counters(text, model=MODEL, version=VERSION) == got
    assert Exposition(text).total("uq_queue_rows") == 3
    assert workers[1].end() == 0


def test_workers_killed_while_joining_never_count_twice(spawn, tmp_path):
    n, claim = 1200, 20
    stream = classification(n)
    ledger = Ledger.open(tmp_path / "ledger.sqlite")
    try:
        record(ledger, stream, list(range(n)))
        assert ledger.flush()
        items = [LabelItem(MODEL, id, int(y)) for id, y in zip(stream.ids, stream.y, strict=True)]
        assert set(ledger.add_labels(items)) == {"accepted"}

        def counted() -> np.ndarray:
            reader = spawn(n)
            x = Exposition(reader.ask("render"))
            assert reader.end() == 0
            found = x.values("uq_labeled_predictions_total", model=MODEL)
            return np.array([found[k] for k in sorted(found, key=lambda k: sorted(k))])

        # Killed between the commit of a claim and its counters: exactly that claim is lost.
        dies = spawn(n, claim_rows=claim, die_after=3)
        dies.send("join")
        assert dies.process.wait(60) == -signal.SIGKILL
        joined = ledger.calibration()["feedback"][MODEL]["joined"]
        assert (joined, counted().sum()) == (3 * claim, 2 * claim)

        # Killed at any moment: two join at once, and each loses at most one claim.
        rng = np.random.default_rng(0)
        kills = 1
        for wanted in (0.3, 0.6):
            pair = [spawn(n, claim_rows=claim) for _ in range(2)]
            for worker in pair:
                worker.ask("queue", rows=0)  # it has started
                worker.send("join")
            deadline = time.monotonic() + DEADLINE_S
            while ledger.calibration()["feedback"][MODEL]["joined"] < wanted * n:
                assert time.monotonic() < deadline
            for worker in rng.permutation(np.array(pair, dtype=object)):
                worker.kill()
                kills += 1
        last = spawn(n, claim_rows=claim)
        last.ask("join")
        assert last.end() == 0

        edges = np.arange(1, 21) / 20
        index = np.searchsorted(edges, stream.fields["confidence"].astype(np.float64), "left")
        exact = np.bincount(index, minlength=20)
        found = counted()
        assert (found <= exact).all()
        assert n - kills * claim <= found.sum() < n

        # The ledger itself has lost nothing.
        expected = by_definition(stream, list(range(n)))
        entry = ledger.calibration()["models"][0]
        assert [b["labelled"] for b in entry["bins"]] == exact.tolist()
        for name in ("accuracy", "ece", "log_loss", "brier"):
            assert entry[name] == pytest.approx(expected[name], abs=1e-12)
    finally:
        ledger.close()
