"""Bundles made once for all tests of the service, and real servers around our application."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from service.app import create_app
from service.settings import Settings
from tests.factory import tiny_bundle


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """A bundle with input ``x`` float32 [N,4] and classes a, b, c."""
    return tiny_bundle(tmp_path_factory.mktemp("served") / "classifier")


@pytest.fixture(scope="session")
def regressor(tmp_path_factory) -> Path:
    """A bundle with input ``x`` float32 [N,3] and one output."""
    return tiny_bundle(tmp_path_factory.mktemp("served") / "regressor", "regression")


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
