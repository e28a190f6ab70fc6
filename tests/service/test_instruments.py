"""The metrics: batches count as their rows do, series start at 0, labels stay a closed set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from calibration.metrics.totals import (
    BIN_EDGES,
    BIN_LABELS,
    ClassificationTotals,
    LevelTotals,
    RegressionTotals,
    update_classification,
    update_regression,
)
from service import instruments, metrics
from service.exposition import BulkHistogram
from tests.service.streams import (
    IDENTITY,
    LEVEL,
    Exposition,
    by_definition,
    classification,
    from_counters,
    regression,
)

ROOT = Path(__file__).parents[2]


def exposition() -> Exposition:
    return Exposition(instruments.render().decode())


def register(model: str, task: str = "classification", **options) -> dict[str, str]:
    instruments.register_model(model, "1", IDENTITY, "laplace", [LEVEL, "0.95"], task, **options)
    return {"model": model, "version": "1"}


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.lists(
        st.one_of(st.floats(0, 1), st.sampled_from([*BIN_EDGES.tolist(), 0.0, 5.0])), max_size=40
    )
)
def test_a_batch_counts_as_its_rows_do(values):
    names = [CollectorRegistry(), CollectorRegistry()]
    bulk = BulkHistogram("h", "h", registry=names[0], buckets=BIN_EDGES.tolist())
    slow = Histogram("h", "h", registry=names[1], buckets=BIN_EDGES.tolist())
    bulk.observe_many(np.array(values))
    for value in values:
        slow.observe(value)
    a, b = (Exposition(generate_latest(r).decode()).samples for r in names)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value == pytest.approx(b[key], abs=1e-9)


@pytest.mark.parametrize("n", [2, 20])
def test_what_is_not_finite_is_not_observed(n):
    registry = CollectorRegistry()
    h = BulkHistogram("h", "h", ["x"], registry=registry, buckets=[1.0])
    h.labels("y").observe_many(np.array([math.nan, 0.5, math.inf][:2] * n))
    for alone in (math.nan, math.inf):
        h.labels("y").observe_many([alone])
    x = Exposition(generate_latest(registry).decode())
    assert (x.total("h_count"), x.total("h_sum")) == (n, n / 2)


def test_every_series_of_a_bundle_starts_at_zero():
    labels = register("starts")
    x = exposition()
    for name in ("predictions", "correct", "confidence_sum"):
        found = x.values(f"uq_labeled_{name}_total", **labels)
        assert {dict(k)["bin"]: v for k, v in found.items()} == dict.fromkeys(BIN_LABELS, 0.0)
    for name in ("labeled", "covered"):
        found = x.values(f"uq_interval_{name}_total", **labels)
        assert {dict(k)["level"]: v for k, v in found.items()} == {LEVEL: 0, "0.95": 0}
    found = x.values("uq_predictions_total", **labels)
    assert {dict(k)["outcome"] for k in found} == set(metrics.OUTCOMES)
    found = x.values("uq_feedback_total", model="starts")
    assert {dict(k)["result"] for k in found} == set(metrics.FEEDBACK_RESULTS)
    for name in ("log_loss_sum", "brier_sum", "ood", "expected_correct"):
        assert x.total(f"uq_{name}_total", **labels) == 0
    assert x.total("uq_set_size_count", **labels) == 0
    info = x.values("uq_model_info", **labels)
    assert {**dict(next(iter(info)))} == {
        "sha256": IDENTITY,
        "method": "laplace",
        "task": "classification",
    }
    assert list(info.values()) == [1]


def conformal_rows(model: str) -> dict[str, float]:
    found = exposition().values("uq_conformal_rows", model=model)
    return {dict(labels)["version"]: rows for labels, rows in found.items()}


def test_conformal_rows_are_those_of_what_is_served():
    def start(version, identity, rows):
        instruments.register_model(
            "rows", version, identity, "laplace", [LEVEL], "classification", conformal_rows=rows
        )

    def end(version, identity):
        instruments.retire_model("rows", version, identity, "laplace", "classification")

    start("1", "a", 500)
    start("2", "b", 62.5)  # what rows with weights are worth
    end("1", "a")
    assert conformal_rows("rows") == {"2": 62.5}
    # Another bundle of the same version takes its place before the old one is retired.
    start("2", "c", 800)
    end("2", "b")
    assert conformal_rows("rows") == {"2": 800}
    end("2", "c")
    assert conformal_rows("rows") == {}
    register("unknown-rows")
    assert conformal_rows("unknown-rows") == {}


def test_without_stored_probs_log_loss_has_no_series():
    labels = register("many-classes", scored=False)
    x = exposition()
    assert not x.values("uq_log_loss_sum_total", **labels)
    assert not x.values("uq_brier_sum_total", **labels)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_served_batches_count_as_numpy_does(size):
    labels = register(f"served-{size}")
    stream = classification(200)
    for start in range(0, 200, size):
        rows = stream.rows(list(range(start, min(200, start + size))))
        instruments.observe_prediction(labels["model"], "1", rows, LEVEL)
    x, f = exposition(), stream.fields
    confidence = f["confidence"].astype(np.float64)
    assert x.total("uq_predictions_total", **labels) == 200
    assert x.total("uq_predictions_total", outcome="abstained", **labels) == f["abstain"].sum()
    assert x.total("uq_expected_correct_total", **labels) == pytest.approx(confidence.sum())
    assert x.total("uq_ood_total", **labels) == f["ood"].sum()
    for edge in BIN_EDGES:
        le = next(
            v
            for k, v in x.values("uq_confidence_bucket", **labels).items()
            if float(dict(k)["le"]) == edge
        )
        assert le == (confidence <= edge).sum()
    assert x.total("uq_set_size_count", level=LEVEL, **labels) == 200
    assert x.total("uq_set_size_sum", level=LEVEL, **labels) == f["set_size"].sum()
    assert x.total("uq_ood_pvalue_sum", **labels) == pytest.approx(
        f["ood_pvalue"].astype(np.float64).sum()
    )


def test_totals_move_the_counters_to_the_definitions():
    labels = register("totals")
    stream = classification(500)
    f = stream.fields
    for start in range(0, 500, 130):
        rows = slice(start, start + 130)
        y = stream.y[rows]
        totals = update_classification(
            ClassificationTotals(),
            confidence=f["confidence"][rows],
            label=f["label"][rows],
            y=y,
            probs=f["probs"][rows],
            covered=f["set"][rows][np.arange(len(y)), y],
            set_size=f["set_size"][rows],
            level=LEVEL,
        )
        instruments.add_totals("totals", "1", totals)
    got = from_counters(instruments.render().decode(), **labels)
    expected = by_definition(stream, list(range(500)))
    assert got["n"] == 500
    for name in ("accuracy", "ece", "log_loss", "brier", "coverage"):
        assert got[name] == pytest.approx(expected[name], abs=1e-9), name


def test_regression_has_crps_width_and_coverage():
    labels = register("regressor", "regression")
    stream = regression(80)
    f = stream.fields
    instruments.observe_prediction("regressor", "1", f, LEVEL)
    totals = update_regression(
        RegressionTotals(),
        mean=f["mean"],
        std=f["std"],
        y=stream.y,
        lower=f["lower"],
        upper=f["upper"],
        level=LEVEL,
    )
    instruments.add_totals("regressor", "1", totals)
    endless = RegressionTotals(n=1, levels={LEVEL: LevelTotals(1, 1, math.inf)})
    instruments.add_totals("regressor", "1", endless)
    x = exposition()
    assert x.total("uq_predictions_total", outcome="answered", **labels) == 80
    assert x.values("uq_labeled_predictions_total", **labels) == {frozenset({("bin", "all")}): 81}
    assert x.total("uq_crps_sum_total", **labels) == pytest.approx(totals.crps_sum)
    width = (f["upper"].astype(float) - f["lower"]).mean(axis=1).sum()
    assert x.total("uq_interval_width_sum_total", level=LEVEL, **labels) == pytest.approx(width)
    assert (
        x.total("uq_interval_covered_total", level=LEVEL, **labels)
        == totals.levels[LEVEL].covered + 1
    )
    # An over-sharp density has a negative log loss, which no counter could hold.
    assert not x.values("uq_log_loss_sum_total", **labels)
    assert not x.values("uq_labeled_correct_total", **labels)


def test_labels_from_outside_make_no_series():
    labels = register("closed")
    instruments.count_feedback("no such model", "invalid", 3)
    totals = ClassificationTotals(
        levels={f"0.{i}": LevelTotals(1, 1, 1.0) for i in range(100, 400)}
    )
    instruments.add_totals("closed", "1", totals)
    # A version from before the restart: its levels are not known, so a few are let in.
    instruments.add_totals("closed", "0", totals)
    stream = classification(3)
    instruments.observe_prediction("closed", "1", stream.fields, "0.123")
    x = exposition()
    assert not x.values("uq_feedback_total", model="no such model")
    assert x.total("uq_feedback_total", model="unknown", result="invalid") >= 3
    assert len(x.values("uq_interval_labeled_total", **labels)) == 2
    assert len(x.values("uq_interval_labeled_total", model="closed", version="0")) == 16
    assert len(x.values("uq_set_size_sum", **labels)) == 2
    with pytest.raises(ValueError, match="none of accepted"):
        instruments.count_feedback("closed", "made up")


def test_requests_stages_batches_and_queues():
    register("rejects")
    before = exposition()
    instruments.observe_requests([("/test", 200, 0.02), ("/other", 200, 1.0), ("/test", 200, 0.04)])
    instruments.observe_batches([(17, [0.002, 0.004], 0.5), (3, [0.25], 0.25)])
    instruments.set_queue_rows([7, 5])
    instruments.count_rejected("test")
    instruments.count_rejected_rows("rejects", "1", 2)
    instruments.count_rejected_rows("rejects", "unheard of", 2)
    instruments.observe_feedback_delay("rejects", np.array([30.0, 4000.0]))
    x = exposition()
    assert x.total("uq_request_duration_seconds_count", route="/test", code="200") == 2
    assert x.total("uq_request_duration_seconds_sum", route="/test") == pytest.approx(0.06)

    def moved(name, **labels):
        return x.total(name, **labels) - math.fsum(before.values(name, **labels).values())

    assert (moved("uq_batch_rows_sum"), moved("uq_batch_rows_count")) == (20, 2)
    for stage, seconds, n in (("queue", 0.256, 3), ("model", 0.75, 2)):
        assert moved("uq_stage_duration_seconds_sum", stage=stage) == pytest.approx(seconds)
        assert moved("uq_stage_duration_seconds_count", stage=stage) == n
    assert x.total("uq_queue_rows") == 5
    assert x.total("uq_rejected_total", reason="test") == 1
    assert x.total("uq_predictions_total", model="rejects", outcome="rejected") == 2
    assert x.total("uq_feedback_delay_seconds_sum", model="rejects") == 4030
    instruments.set_queue_rows([0])


CHILD = """
import numpy as np
from service import instruments, metrics
from service.expected_loss import LossScale
from service.monitor.publish import registry
from tests.service.streams import *
stream, values = classification(20), regression(20)
loss = LossScale(0.5, 0.1)
instruments.register_model(
    "m", "1", IDENTITY, "laplace", [LEVEL], "classification", conformal_rows=500, loss=loss
)
instruments.register_model("r", "1", IDENTITY, "laplace", [LEVEL], "regression")
instruments.observe_prediction("m", "1", stream.fields, LEVEL)
instruments.observe_prediction("r", "1", values.fields, LEVEL)
instruments.observe_requests([("/v1/predict", 200, 0.01)])
instruments.observe_batches([(20, [0.01], 0.01)])
instruments.count_rejected("invalid")
instruments.set_queue_rows([1])
instruments.set_provider("CPUExecutionProvider")
metrics.LEDGER_QUEUE_ROWS.set(1)
text = instruments.render()
names = {name for name, _ in Exposition(text.decode()).samples if name.startswith("uq_")}
others = {f.name for f in registry().collect()}  # of the monitor, a process of its own
others |= {next(iter(g.describe())).name for g in metrics.BATCH_JOB}  # of runs of hedged score
ours = {n for n in metrics.METRIC_NAMES if n.removesuffix("_total") not in others}
assert names == ours, names ^ ours
import sys
sys.stdout.buffer.write(text)
"""


@pytest.mark.parametrize("processes", ["one", "several"])
def test_promtool_likes_the_exposition_of_one_and_of_several_processes(processes, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
    if processes == "several":
        env["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path)
        (tmp_path / "counter_1.db").touch()  # of a worker killed while it started
    run = [sys.executable, "-W", "error", "-c", CHILD]
    text = subprocess.run(run, cwd=ROOT, env=env, check=True, capture_output=True).stdout
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, check=False, capture_output=True
    )
    complaints = [
        line for line in (done.stdout + done.stderr).decode().splitlines() if line.startswith("uq_")
    ]
    assert complaints == []
