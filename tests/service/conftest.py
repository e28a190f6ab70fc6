"""Bundles made once for all tests of the service, and real servers around our application."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self, TypeVar

import httpx
import psutil
import pytest
import uvicorn

from service.app import create_app
from service.bundles import write_active
from service.settings import Settings
from tests.factory import tiny_bundle, version_of
from tests.service.maps import dense_bundle

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """A bundle with input ``x`` float32 [N,4] and classes a, b, c."""
    return tiny_bundle(tmp_path_factory.mktemp("served") / "classifier")


@pytest.fixture(scope="session")
def regressor(tmp_path_factory) -> Path:
    """A bundle with input ``x`` float32 [N,3] and one output."""
    return tiny_bundle(tmp_path_factory.mktemp("served") / "regressor", "regression")


@pytest.fixture(scope="session")
def other_classifier(tmp_path_factory) -> Path:
    """A bundle of the same inputs and classes as ``classifier`` whose answers differ."""
    return tiny_bundle(tmp_path_factory.mktemp("served") / "other", method="none")


@pytest.fixture
def versions(classifier, other_classifier, tmp_path) -> Callable[[str], Path]:
    """Makes a root of one model, versions 1 and 2, of which 1 is live. Metrics are of the process,
    so each test has a name of its own."""

    def make(name: str) -> Path:
        root = tmp_path / "root"
        version_of(classifier, root, name, "1")
        version_of(other_classifier, root, name, "2")
        write_active(root / name, "1")
        return root

    return make


@pytest.fixture(scope="session")
def maps_root(tmp_path_factory) -> Path:
    """A root of two dense bundles: ``segmenter``, of images 2×8×8 to three classes, and
    ``restorer``, of images 2×H×W of any size to one output."""
    root = tmp_path_factory.mktemp("maps") / "root"
    dense_bundle(root / "segmenter" / "1", "segmenter", "classification")
    dense_bundle(root / "restorer" / "1", "restorer", "regression", free=True)
    return root


@pytest.fixture(scope="session")
def served(classifier, regressor, tmp_path_factory) -> Iterator[Callable[..., Server]]:
    """Starts a server of the classifier, or of ``task="regression"``; settings as keywords."""
    with contextlib.ExitStack() as stack:

        def start(task: str = "classification", **settings: object) -> Server:
            bundle = classifier if task == "classification" else regressor
            data = tmp_path_factory.mktemp("data")
            return stack.enter_context(
                Server(Settings(**{"bundles": bundle, "data_dir": data, **settings}))
            )

        yield start


class Server:
    """Our application behind uvicorn in a thread, on a port of the system's choice."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        # The signal handlers of a server belong to the main thread; here the test ends it.
        self.uvicorn = uvicorn.Server(
            uvicorn.Config(self.app, host="127.0.0.1", port=0, log_config=None, lifespan="on")
        )
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def __enter__(self) -> Server:
        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.uvicorn.started and self.thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.uvicorn.started
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.uvicorn.should_exit = True
        self.thread.join(timeout=60)
        assert not self.thread.is_alive()


class BentoServer:
    """``bentoml serve`` of ``target`` in a process of its own, with its own BENTOML_HOME."""

    cwd: Path = ROOT

    def __init__(self, home: Path, target: str = "service.bento:svc", **environ: str) -> None:
        self.home = home
        self.log = home / "server.log"
        self.command = [sys.executable, "-m", "bentoml", "serve", target]
        self.command += ["--host", "127.0.0.1", "--port", "0"]
        self.command += ["--timeout-graceful-shutdown", "30"]
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HEDGED_", "PROMETHEUS_"))},
            "BENTOML_HOME": str(home / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
            "HEDGED_DATA_DIR": str(home),
            **environ,
        }
        (home / "bentoml").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.process = psutil.Popen(
                self.command, env=self.environ, stdout=log, stderr=log, cwd=self.cwd
            )
        try:
            self.port = self._wait(self._listening)
            self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
            self._wait(self._ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "client"):
            self.client.close()
        if self.process.is_running():
            self.process.terminate()
        self.process.wait(timeout=60)

    def workers(self) -> list[psutil.Process]:
        """The worker processes."""
        return [
            p
            for p in self.process.children(recursive=True)
            if "_bentoml_impl.worker.service" in p.cmdline()
        ]

    def _listening(self) -> int | None:
        # The arbiter has sockets of its own; a worker inherits only the one that serves.
        for worker in self.workers():
            for connection in worker.net_connections("tcp4"):
                if connection.status == psutil.CONN_LISTEN:
                    return int(connection.laddr.port)
        return None

    def _ready(self) -> bool:
        try:
            return self.client.get("/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _wait(self, ask: Callable[[], T | None]) -> T:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(psutil.Error):
                if found := ask():
                    return found
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())
