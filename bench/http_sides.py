"""The servers of `bench.http`: how each is started, and how it is asked for one row."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from bench import suite
from bench.material import Files, magika_columns, magika_files
from bench.peers import ROOT, environment
from bench.wrk import Load, latencies, wrk
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.predictor import Predictor
from posthoc.contract import Array, HedgedError

FIELDS = ("label", "probs", "confidence", "set", "ood", "abstain")
SET = "magic"  # ten columns
START_S = 120  # MLServer imports much


def tabular(folder: Path) -> Path:
    """A bundle of a small tabular model, so that servers and not the model are measured."""
    chosen = suite.find(SET)
    return _fitted(suite.files_of(chosen), Columns(target=chosen.target), folder, "tabular")


def magika(folder: Path) -> Path:
    """A bundle of magika."""
    return _fitted(magika_files(), magika_columns(), folder, "magika")


def _fitted(files: Files, columns: Columns, folder: Path, name: str) -> Path:
    options, cache = FitOptions(task="classification"), folder / "cache"
    fit(files.model, files.data, folder / name, options, columns=columns, cache_dir=cache)
    return folder / name


@dataclass(frozen=True, slots=True)
class Side:
    """A server that stands: where it answers, to which body."""

    name: str
    url: str
    body: bytes

    def load(self, connections: int, seconds: float) -> Load:
        """One run of wrk."""
        return wrk(self.url, self.body, connections, seconds)

    def latencies(self, seconds: float) -> tuple[Load, list[float]]:
        """One run on one connection, and the seconds that each request took."""
        return latencies(self.url, self.body, seconds)


@dataclass(frozen=True, slots=True)
class Question:
    """The bundle's first golden row, as each side is asked: ``infer`` and ``path`` are ours,
    ``plain`` {"x": rows}, ``tensors`` MLServer's. ``feed`` names the only input."""

    bundle: Path
    feed: str
    path: str
    infer: bytes
    plain: bytes
    tensors: bytes

    @classmethod
    def of(cls, bundle: Path) -> Self:
        """The bodies of one bundle."""
        predictor = Predictor(bundle)
        (spec,) = predictor.inputs
        with np.load(bundle / "golden.npz", allow_pickle=False) as data:
            row = np.asarray(data[f"in/{spec.name}"][:1])
        wanted = [{"name": field} for field in FIELDS]
        tensor = {**_tensor(row, "x"), "parameters": {"content_type": "np"}}
        return cls(
            bundle=bundle,
            feed=spec.name,
            path=f"/v2/models/{predictor.manifest.name}/infer",
            infer=_json({"inputs": [_tensor(row, spec.name)], "outputs": wanted}),
            plain=_json({"x": row.tolist()}),
            tensors=_json({"inputs": [tensor]}),
        )


Sides = dict[str, contextlib.AbstractContextManager[Side]]


def sides(question: Question, folder: Path) -> Sides:
    """Servers of the bundle's graph by name, ours first; each has a folder of its own below."""
    return plain_sides(question, folder) | _mlservers(question, folder)


def plain_sides(question: Question, folder: Path) -> Sides:
    """The servers that run in this environment."""
    bundle, feed = question.bundle, question.feed
    graph = str(bundle / "predictor.onnx")
    port = _free_ports(3)
    named = {"BENCH_GRAPH": graph, "BENCH_FEED": feed, "BENCH_OUTPUT": "probs"}
    floor = [sys.executable, "-m", "bench.http_floor", graph, feed, str(port[1]), ",".join(FIELDS)]
    serve = ["-m", "bentoml", "serve", "bench.http_bentoml:Peer"]
    serve += ["--host", "127.0.0.1", "--port", str(port[2])]
    return {
        "ours": _server(
            Side("ours", f"http://127.0.0.1:{port[0]}{question.path}", question.infer),
            [sys.executable, "-m", "hedged", "serve", str(bundle), "--port", str(port[0])],
            folder / "ours",
            {"HEDGED_THREADS": "1", "HEDGED_DATA_DIR": str(folder / "ours"), "HEDGED_DRAIN_S": "0"},
        ),
        "starlette": _server(
            Side("starlette", f"http://127.0.0.1:{port[1]}/", question.plain),
            floor,
            folder / "floor",
        ),
        "bentoml": _server(
            Side("bentoml", f"http://127.0.0.1:{port[2]}/predict", question.plain),
            [sys.executable, *serve],
            folder / "bentoml",
            {**named, "BENTOML_HOME": str(folder / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"},
        ),
    }


def _mlservers(question: Question, folder: Path) -> Sides:
    """MLServer, in an environment of its own: without and with its batching."""
    graph, python = str(question.bundle / "predictor.onnx"), str(environment("mlserver"))
    found: Sides = {}
    for side, batch in (("mlserver", 0), ("mlserver batching", 64)):
        port = _free_ports(3)
        home = folder / side.replace(" ", "-")
        home.mkdir()
        for file, text in _mlserver(graph, question.feed, port, batch).items():
            (home / file).write_text(json.dumps(text))
        found[side] = _server(
            Side(side, f"http://127.0.0.1:{port[0]}/v2/models/peer/infer", question.tensors),
            [python, "-c", "from mlserver.cli import main; main()", "start", str(home)],
            home,
        )
    return found


@contextlib.contextmanager
def _server(
    side: Side, command: Sequence[str], folder: Path, more: Mapping[str, str] | None = None
) -> Iterator[Side]:
    """A server process from the first good answer to the end of the block."""
    folder.mkdir(exist_ok=True)
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **limits, "PYTHONPATH": str(ROOT), **(more or {})},
            stdout=out,
            stderr=out,
        )
    try:
        deadline = time.monotonic() + START_S
        while not _answers(side):
            if process.poll() is not None or time.monotonic() > deadline:
                raise HedgedError(f"{side.name} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield side
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(side: Side) -> bool:
    request = urllib.request.Request(
        side.url, side.body, {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _mlserver(graph: str, feed: str, ports: Sequence[int], batch: int) -> dict[str, dict[str, Any]]:
    """MLServer's two files: no process pool, the faster for a small model, and adaptive batching of
    at most ``batch`` rows where that is not 0."""
    http, grpc, metrics = ports
    return {
        "settings.json": {
            "host": "127.0.0.1",
            "http_port": http,
            "grpc_port": grpc,
            "metrics_port": metrics,
            "parallel_workers": 0,
            "debug": False,
        },
        "model-settings.json": {
            "name": "peer",
            "implementation": "bench.http_mlserver.Runtime",
            **({"max_batch_size": batch, "max_batch_time": 0.002} if batch else {}),
            "parameters": {"uri": graph, "extra": {"feed": feed, "output": "probs"}},
        },
    }


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _tensor(value: Array, name: str) -> dict[str, Any]:
    kind = {"f": "FP", "i": "INT", "u": "UINT"}[value.dtype.kind]
    return {
        "name": name,
        "shape": list(value.shape),
        "datatype": f"{kind}{8 * value.dtype.itemsize}",
        "data": value.ravel().tolist(),
    }


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in opened:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in opened]
