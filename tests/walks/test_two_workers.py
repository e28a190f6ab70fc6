"""Two real server processes, 10,000 labelled predictions: the counters of ``/metrics`` give numpy's
calibration figures to 1e-9, whichever worker answered what."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from calibration.predictor import Predictor
from hedged.demo.server import Server
from tests.factory import rows

N, BATCH = 10_000, 100


@pytest.fixture(scope="module")
def told(classification_bundle: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """(exposition text, ledger's summary, probabilities, labels, y, worker pids) after the walk."""
    x, y = rows("classification", N, 11)
    folder = tmp_path_factory.mktemp("two")
    specs = Predictor(classification_bundle).inputs
    starts = range(0, N, BATCH)
    with Server(classification_bundle, folder, threads=1, workers=2) as server:

        def ask(start: int) -> dict[str, np.ndarray]:
            part = {"x": x[start : start + BATCH]}
            return server.infer("tiny", part, specs, f"b{start}")

        def label(start: int) -> dict[str, int]:
            return server.label({f"b{start}:{i}": int(y[start + i]) for i in range(BATCH)})

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, starts))
            # Every label is sent twice, from two threads at once.
            counts = list(pool.map(label, [*starts, *starts]))

        deadline = time.monotonic() + 60
        while True:
            text = server.request("/metrics").decode()
            if total(text, "uq_labeled_predictions_total") >= N or time.monotonic() > deadline:
                break
        summary = json.loads(server.request("/v1/calibration"))
    found = {k: np.concatenate([a[k] for a in answers]) for k in answers[0]}
    results: dict[str, int] = {}
    for part in counts:
        for key, n in part.items():
            results[key] = results.get(key, 0) + n
    pids = {p.stem.split("_")[-1] for p in folder.glob("**/counter_*.db")}
    return text, summary, found, y, results, pids


def total(text: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples whose labels include ``labels``."""
    return sum(
        s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name == name and labels.items() <= s.labels.items()
    )


def test_both_workers_answered_and_no_label_counts_twice(told) -> None:  # type: ignore[no-untyped-def]
    text, summary, _, _, results, pids = told
    assert len(pids) >= 2
    assert total(text, "uq_labeled_predictions_total") == N
    assert total(text, "uq_predictions_total") == N
    assert sum(results.values()) == 2 * N
    assert results["duplicate"] == N
    (model,) = summary["models"]
    assert (model["served"], model["labelled"]) == (N, N)


def test_counters_are_numpy(told) -> None:  # type: ignore[no-untyped-def]
    text, summary, found, y, _, _ = told
    confidence = found["confidence"].astype(np.float64)
    right = found["label"] == y
    gaps = 0.0
    for k in range(1, 21):
        upper, lower = k / 20, (k - 1) / 20
        inside = (confidence <= upper) & ((confidence > lower) | (k == 1))
        gaps += abs(right[inside].sum() - confidence[inside].sum())
    bins = [f"{k / 20:.2f}" for k in range(1, 21)]
    ece = sum(
        abs(
            total(text, "uq_labeled_correct_total", bin=b)
            - total(text, "uq_labeled_confidence_sum_total", bin=b)
        )
        for b in bins
    ) / total(text, "uq_labeled_predictions_total")
    assert ece == pytest.approx(gaps / N, abs=1e-9)
    (model,) = summary["models"]
    assert model["ece"] == pytest.approx(gaps / N, abs=1e-9)
    probs = found["probs"].astype(np.float64)
    log_loss = -np.log(probs[np.arange(N), y]).mean()
    assert total(text, "uq_log_loss_sum_total") / N == pytest.approx(log_loss, abs=1e-9)
    brier = ((probs - np.eye(3)[y]) ** 2).sum(1).mean()
    assert total(text, "uq_brier_sum_total") / N == pytest.approx(brier, abs=1e-9)
    covered = found["set"][np.arange(N), y].sum()
    assert total(text, "uq_interval_covered_total", level="0.9") == covered
    assert total(text, "uq_interval_labeled_total", level="0.9") == N
