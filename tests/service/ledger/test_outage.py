"""PostgreSQL is stopped while a server answers: no prediction fails and nothing is lost."""

from __future__ import annotations

import subprocess
import threading
import time

import httpx
import numpy as np
import pytest

from service.settings import Settings
from tests.factory import CLASSES, rows
from tests.service.conftest import Server
from tests.service.helpers import as_rows, poll
from tests.service.ledger.helpers import metric

ROWS = 4  # of a request


class Client(threading.Thread):
    """Predicts and labels every second row, until it is told to stop."""

    def __init__(self, port: int, name: str, seed: int) -> None:
        super().__init__()
        self.base = f"http://127.0.0.1:{port}"
        self.prefix = name
        self.rng = np.random.default_rng(seed)
        self.ended = threading.Event()
        self.failed: list[object] = []
        self.right: dict[str, bool] = {}  # of labelled ids, whether the prediction was right
        self.predicted = 0
        self.outcomes: set[str] = set()

    def run(self) -> None:
        x, y = rows("classification", 200, 5)
        with httpx.Client(base_url=self.base, timeout=60) as client:
            while not self.ended.is_set():
                chosen = self.rng.integers(len(x), size=ROWS)
                id = f"{self.prefix}{self.predicted}"
                answer = client.post("/v1/predict", json={"rows": as_rows(x[chosen]), "id": id})
                if answer.status_code != 200:
                    self.failed.append(answer.text)
                    continue
                self.predicted += ROWS
                found = answer.json()["predictions"]
                items = [
                    {"id": f"{id}:{k}", "label": CLASSES[y[chosen[k]]]} for k in range(0, ROWS, 2)
                ]
                sent = client.post("/v1/labels", json=items)
                if sent.status_code not in (200, 202):
                    self.failed.append(sent.text)
                    continue
                self.outcomes |= set(sent.json()["counts"])
                for k, item in zip(range(0, ROWS, 2), items, strict=True):
                    self.right[item["id"]] = found[k]["label"] == item["label"]


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.long)])
def test_a_store_that_stops_under_load_costs_nothing(
    classifier, tmp_path, postgres, postgres_url, seconds
):
    settings = Settings(bundles=classifier, data_dir=tmp_path, ledger=postgres_url)
    with Server(settings) as server:
        stop_and_count(server, postgres, seconds)


def start(postgres) -> None:
    """Start the store again. The clients take the cores, and what starts it waits ten seconds, and
    fails on the store's own file when it finds that half written."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return postgres.ensure_postgres_running()
        except (subprocess.TimeoutExpired, AssertionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)  # only how often to look


def stop_and_count(server: Server, postgres, seconds: float) -> None:
    dropped = metric("uq_ledger_dropped_total")
    clients = [Client(server.port, f"c{n}-", n) for n in range(3)]
    for client in clients:
        client.start()

    def answered(more: int) -> None:
        before = [c.predicted for c in clients]
        poll(
            lambda: [c.predicted for c in clients],
            lambda now: all(b >= a + more for a, b in zip(before, now, strict=True)),
        )

    try:
        answered(40)
        postgres.stop()
        until = time.monotonic() + seconds
        answered(40)
        while time.monotonic() < until:
            answered(ROWS)
        start(postgres)
        answered(40)
    finally:
        for client in clients:
            client.ended.set()
        for client in clients:
            client.join(60)
    assert [c.failed for c in clients] == [[], [], []]
    assert all("spooled" in c.outcomes for c in clients)
    right = {id: hit for c in clients for id, hit in c.right.items()}
    predicted = sum(c.predicted for c in clients)

    def calibration():
        answer = server.client.get("/v1/calibration")
        return answer.json()["models"][0] if answer.status_code == 200 else {}

    found = poll(
        calibration,
        lambda m: m.get("served") == predicted and m.get("labelled") == len(right),
        seconds=60,
    )
    assert found["accuracy"] == pytest.approx(np.mean([*right.values()]))
    assert metric("uq_ledger_dropped_total") == dropped
