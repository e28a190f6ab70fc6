"""``python -m bench labels``: labels a second into SQLite, and what the ledger costs a prediction.

``rows_per_second`` is of NDJSON over HTTP to `hedged serve`, from the first byte sent until the
last label is answered, which is when it is on disk; ``joined_per_second`` until
``/v1/calibration`` counts them, whose answers may be two seconds old. ``cli_rows_per_second`` is of
`hedged labels` on a Parquet file beside the running server, the start of Python included.
``ratio_p50_with_ledger`` is the median time of a prediction of one row through the whole
application with the ledger over that without it, in one process and in turn (both count and export
metrics). The model is the small tabular one of `bench.http`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.http_sides import Question, plain_sides, tabular
from bench.peers import ROOT, Worker
from bench.timing import Times
from calibration.predictor import Predictor

_REQUEST = 4_000  # rows of a request for predictions
_LABELS = 10_000  # labels of a request
_WAIT_S = 300
_SETTLE_S = 3.0  # longer than a prediction's way, and than an answer of the server is kept


def run(quick: bool) -> dict[str, Any]:
    """Rates and the ratio; more of each where there is time."""
    with tempfile.TemporaryDirectory(prefix="hedged-bench-") as name:
        folder = Path(name)
        question = Question.of(tabular(folder))
        ratio = _ratio(question, folder, 5 if quick else 20)
        return {**rates(question, folder, 20_000 if quick else 100_000), **ratio}


def rates(question: Question, folder: Path, rows: int) -> dict[str, Any]:
    """Labels a second for so many predictions of a server, over HTTP and from a file."""
    (folder / "server").mkdir()
    with plain_sides(question, folder / "server")["ours"] as server:
        base = server.url.removesuffix(question.path)
        with httpx.Client(base_url=base, timeout=120) as client:
            return _rates(client, question, folder, rows)


def _ratio(question: Question, folder: Path, rounds: int) -> dict[str, Any]:
    metrics = folder / "metrics"
    metrics.mkdir()
    environ = {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    with Worker.here("bench.labels_ours", environ=environ) as worker:
        found = worker.call(
            "ratio",
            bundle=str(question.bundle),
            folder=str(folder),
            path=question.path,
            body=question.infer.decode(),
            rounds=rounds,
            calls=1000,
        )
    on, off = Times(tuple(found["on"])), Times(tuple(found["off"]))
    pairs = [a / b for a, b in zip(on.seconds, off.seconds, strict=True)]
    return {
        "ratio_p50_with_ledger": on.median / off.median,
        "p50": {
            "with_ledger": on.record(),
            "without": off.record(),
            "ratio_low": min(pairs),
            "ratio_high": max(pairs),
        },
    }


def _rates(client: httpx.Client, question: Question, folder: Path, rows: int) -> dict[str, Any]:
    ids = _predict(client, question, "http", rows)
    found = _by_http(client, ids)
    ids = _predict(client, question, "file", rows)
    return found | _by_file(client, folder, ids) | {"labels": rows}


def _by_http(client: httpx.Client, ids: list[str]) -> dict[str, Any]:
    bodies = [
        b"".join(b'{"id":"%s","label":%d}\n' % (i.encode(), n % 2) for n, i in enumerate(part))
        for part in _parts(ids)
    ]
    before = _model(client)["labelled"]
    started = time.perf_counter()
    for body in bodies:
        answer = client.post(
            "/v1/labels", content=body, headers={"content-type": "application/x-ndjson"}
        )
        counts = answer.raise_for_status().json()["counts"]
        assert set(counts) == {"accepted"}, counts
    answered = time.perf_counter() - started
    _until(lambda: _model(client)["labelled"] == before + len(ids))
    joined = time.perf_counter() - started
    return {
        "rows_per_second": len(ids) / answered,
        "joined_per_second": len(ids) / joined,
    }


def _by_file(client: httpx.Client, folder: Path, ids: list[str]) -> dict[str, Any]:
    file = folder / "labels.parquet"
    pq.write_table(pa.table({"id": ids, "label": np.arange(len(ids)) % 2}), file)
    ledger = folder / "server" / "ours" / "hedged-ledger.sqlite"
    before = _model(client)["labelled"]
    started = time.perf_counter()
    command = [sys.executable, "-m", "hedged", "labels", str(ledger), str(file), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    said = json.loads(done.stdout)
    assert said["counts"]["accepted"] == len(ids), said
    _until(lambda: _model(client)["labelled"] == before + len(ids))
    return {
        "cli_rows_per_second": len(ids) / seconds,
        "cli_rows_per_second_without_start": len(ids) / said["seconds"],
    }


def _predict(client: httpx.Client, question: Question, name: str, rows: int) -> list[str]:
    """The ids of so many new predictions that are in the ledger."""
    (spec,) = Predictor(question.bundle).inputs
    x = np.random.default_rng(0).standard_normal((_REQUEST, *spec.shape[1:])).astype(np.float32)
    before = _settled(client)
    ids: list[str] = []
    for start in range(0, rows, _REQUEST):
        n = min(_REQUEST, rows - start)
        tensor = {"name": spec.name, "shape": [n, *x.shape[1:]], "datatype": "FP32"}
        body = {
            "id": f"{name}{start}",
            "inputs": [{**tensor, "data": x[:n].ravel().tolist()}],
            "outputs": [{"name": "label"}],
        }
        client.post(question.path, json=body).raise_for_status()
        ids += [f"{name}{start}:{row}" for row in range(n)]
    _until(lambda: _model(client)["served"] == before + rows)
    return ids


def _model(client: httpx.Client) -> dict[str, Any]:
    (found,) = client.get("/v1/calibration").raise_for_status().json()["models"]
    model: dict[str, Any] = found
    return model


def _settled(client: httpx.Client) -> int:
    """Predictions in the ledger, once none is on its way there: the question that the server was
    asked to see that it stands arrives a little later."""
    found = -1
    while found != (now := int(_model(client)["served"])):
        found = now
        time.sleep(_SETTLE_S)
    return found


def _parts(ids: list[str]) -> list[list[str]]:
    return [ids[start : start + _LABELS] for start in range(0, len(ids), _LABELS)]


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError("the server did not come to know all of it")
        time.sleep(0.05)
