"""The processes of an incident: traffic that can drift, a Prometheus, and what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from hedged.demo.server import Server
from posthoc.contract import TensorSpec
from tests import factory
from tests.ports import held_port

ROWS = 50  # of a request
PATIENCE_S = 150.0


class Traffic:
    """Requests for predictions, one after the other in a thread, and labels where they are let.

    After ``drift()`` inputs lie elsewhere, and truth is noisier than the model thinks.
    """

    def __init__(self, server: Server, specs: tuple[TensorSpec, ...]) -> None:
        self._server, self._specs = server, specs
        self._rng = np.random.default_rng(0)
        self._weights = factory.weights("classification")
        self._stop = threading.Event()
        self._held: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run)
        self.drifted = False
        self.labels = True
        self.failed: Exception | None = None
        self.covered: dict[str, list[bool]] = {}  # by the version that answered

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            turn = 0
            while not self._stop.is_set():
                self._turn(f"t{turn}")
                turn += 1
                self._stop.wait(0.05)
        except Exception as e:  # told by the test: a thread's own traceback fails nobody
            self.failed = e

    def _turn(self, id: str) -> None:
        x = self._rng.normal(size=(ROWS, 4)) * (1.4 if self.drifted else 1) + 0.5 * self.drifted
        x = x.astype(np.float32)
        t = self._weights
        z = np.tanh(x @ t["w1"] + t["b1"]) @ t["w2"] + t["b2"]
        heat = 8.0 if self.drifted else 2.0
        y = (z / heat + self._rng.gumbel(size=z.shape)).argmax(1)
        answer, version = self._ask(x, id)
        inside = answer["set"][np.arange(ROWS), y]
        self.covered.setdefault(version, []).extend(inside.tolist())
        self._held |= {f"{id}:{i}": int(y[i]) for i in range(ROWS)}
        if self.labels:
            held, self._held = self._held, {}
            self._server.label(held)

    def _ask(self, x: np.ndarray, id: str) -> tuple[dict[str, np.ndarray], str]:
        body = {
            "id": id,
            "inputs": [
                {
                    "name": "x",
                    "shape": list(x.shape),
                    "datatype": "FP32",
                    "data": x.ravel().tolist(),
                }
            ],
            "outputs": [{"name": "set"}],
        }
        text = self._server.request("/v2/models/tiny/infer", json.dumps(body).encode())
        answer = json.loads(text)
        found = {o["name"]: np.asarray(o["data"]).reshape(o["shape"]) for o in answer["outputs"]}
        return found, answer["model_version"]


class Prometheus:
    """A Prometheus that scrapes two addresses and judges by a file of rules."""

    def __init__(self, folder: Path, rules: str, targets: dict[str, str]) -> None:
        folder.mkdir()
        (folder / "rules.yml").write_text(rules)
        jobs = "".join(
            f"  - job_name: {name}\n    static_configs: [{{targets: ['{address}']}}]\n"
            for name, address in targets.items()
        )
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 1s}\n"
            f"rule_files: [rules.yml]\nscrape_configs:\n{jobs}"
        )
        self._stack = ExitStack()
        self.url = f"http://127.0.0.1:{self._stack.enter_context(held_port())}"
        self._command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        self._log = folder / "log"

    def __enter__(self) -> Prometheus:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._stack.close()

    def firing(self) -> set[tuple[str, str]]:
        """The alerts that fire: (name, version)."""
        return {
            (alert["labels"]["alertname"], alert["labels"].get("version", ""))
            for alert in self._get("/api/v1/alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def value(self, query: str) -> float | None:
        """The only value of a query; None where it has none."""
        found = self._get(f"/api/v1/query?{urllib.parse.urlencode({'query': query})}")["result"]
        return float(found[0]["value"][1]) if found else None

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return json.loads(answer.read())["data"]
        except OSError:
            if self._process.poll() is not None:
                raise AssertionError(self._log.read_text()[-2000:]) from None
            return {"alerts": [], "result": []}  # it is starting


class Monitor:
    """``hedged monitor`` of a ledger, on a port of its own choice."""

    def __init__(self, ledger: Path, folder: Path, *options: str) -> None:
        self._command = [
            *(sys.executable, "-m", "hedged", "monitor", str(ledger), "--port", "0"),
            *("--state", str(folder / "monitor.json"), *options),
        ]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        found = re.search(r"http://(\S+)/metrics", line)
        assert found is not None, line
        return found[1]

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        assert self._process.stderr is not None
        self._process.stderr.close()


def wait_for(
    what: str,
    true: Callable[[], bool],
    traffic: Traffic,
    instead: Callable[[], object] = lambda: "",
) -> None:
    """Until it is true; AssertionError, saying ``what`` never was and what was ``instead``, after
    PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert traffic.failed is None, traffic.failed
        assert time.monotonic() < deadline, f"never {what}: {instead()}"
        time.sleep(0.2)  # only how often to look
