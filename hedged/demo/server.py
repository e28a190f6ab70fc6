"""A real ``hedged serve`` in a process of its own, and the few requests that the demo makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posthoc.contract import Array, HedgedError, TensorSpec

_DATATYPES = {"int32": "INT32", "int64": "INT64", "float32": "FP32", "float64": "FP64"}
START_SECONDS = 90.0


class Server:
    """``hedged serve`` on a free loopback port; use as a context manager."""

    def __init__(self, bundle: Path, folder: Path, *, threads: int, workers: int = 1):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._held = socket.socket()  # so that nobody else gets the port while the server starts
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port = int(self._held.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HEDGED_")}
        environment |= {
            "HEDGED_THREADS": str(threads),
            "HEDGED_WORKERS": str(workers),
            "HEDGED_DRAIN_S": "0",  # its only client is the one that stops it
            "HEDGED_DATA_DIR": str(folder.resolve()),
            "BENTOML_HOME": str(folder.resolve() / "bentoml"),
        }
        (folder / "bentoml").mkdir(exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hedged", "serve", str(bundle), "--port", str(self.port)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Server:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                self.request("/v2/health/ready")
            except (OSError, HedgedError):
                time.sleep(0.1)
                continue
            return self
        self.stop()
        tail = self.log.read_text(errors="replace")[-2000:]
        raise HedgedError(f"the server did not start; its log {self.log} ends:\n{tail}")

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and wait for it."""
        self._held.close()
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait(self) -> None:
        """Until the server ends by itself or the user interrupts."""
        self._process.wait()

    def request(
        self, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> bytes:
        """GET, or POST ``body``; HedgedError with the server's words for a status above 399."""
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": kind} if body else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as e:
            raise HedgedError(f"{path}: HTTP {e.code}: {e.read().decode()[:500]}") from None

    def predict(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """``POST /v1/predict``: one object per row."""
        answer = json.loads(self.request("/v1/predict", json.dumps(body).encode()))
        found: list[dict[str, Any]] = answer["predictions"]
        return found

    def infer(
        self, model: str, inputs: Mapping[str, Array], specs: Sequence[TensorSpec], id: str
    ) -> dict[str, Array]:
        """``POST /v2/models/{model}/infer`` in JSON: outputs by name."""
        tensors = [
            {
                "name": s.name,
                "shape": list(inputs[s.name].shape),
                "datatype": _DATATYPES[s.dtype],
                "data": inputs[s.name].ravel().tolist(),
            }
            for s in specs
        ]
        body = json.dumps({"id": id, "inputs": tensors}).encode()
        answer = json.loads(self.request(f"/v2/models/{model}/infer", body))
        kinds = {"FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}
        return {
            o["name"]: np.asarray(o["data"], kinds[o["datatype"]]).reshape(o["shape"])
            for o in answer["outputs"]
        }

    def label(self, labels: Mapping[str, Any]) -> dict[str, int]:
        """``POST /v1/labels`` as NDJSON: how many had which result."""
        lines = "\n".join(json.dumps({"id": k, "label": v}) for k, v in labels.items())
        answer = json.loads(self.request("/v1/labels", lines.encode(), "application/x-ndjson"))
        counts: dict[str, int] = answer["counts"]
        return counts

    def counters(self, name: str) -> dict[str, float]:
        """A metric's samples by their ``bin`` label, from ``/metrics``."""
        from prometheus_client.parser import text_string_to_metric_families

        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.request("/metrics").decode()):
            for sample in family.samples:
                if sample.name == name:
                    key = sample.labels.get("bin", "")
                    found[key] = found.get(key, 0.0) + sample.value
        return found
