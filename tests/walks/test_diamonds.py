"""A frozen regressor walks the whole way: fit, serve, predict by column name, label, watch, score.

The model is a small network for the log price of diamonds, trained elsewhere on other rows; the
intervals, error bars, ledger and counters are those of any bundle.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scipy.stats import norm

from bench.regressor import INPUTS, TARGET, regressor
from calibration.conformal.intervals import residual_scores
from calibration.evaluate import evaluate
from calibration.fit import fit, fit_material
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import run_head
from calibration.material import Columns, Material, prepare
from calibration.metrics.coverage import coverage_band
from calibration.metrics.ranking import auroc
from calibration.predictor import Predictor
from hedged.demo.server import Server
from service.scoring import score

FITTED, BATCH, HALF = 20_000, 64, 512
COLUMNS = Columns(target=TARGET, inputs={"features": INPUTS})
LEVELS = {"0.9": 0.1, "0.95": 0.05}
BARS = ("mean", "std", "aleatoric_std", "epistemic_std", "lower", "upper")


@dataclass(frozen=True)
class Walk:
    """What the server answered and counted: HALF rows at each level, all of them labelled."""

    bundle: Path
    live: Path
    rows: pa.Table
    answers: dict[str, list[dict[str, Any]]]
    strange: list[dict[str, Any]]
    counts: dict[str, dict[str, int]]
    metrics: dict[tuple[str, str], float]
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diamonds")


@pytest.fixture(scope="module")
def material(folder: Path) -> Material:
    """The regressor with all rows that it never saw."""
    return prepare(
        regressor().model,
        regressor().data,
        options=FitOptions(task="regression"),
        columns=COLUMNS,
        cache_dir=folder / "cache",
    )


@pytest.fixture(scope="module")
def walk(folder: Path) -> Walk:
    whole = pq.read_table(regressor().data)
    pq.write_table(whole.slice(0, FITTED), folder / "fit.parquet")
    rows = whole.slice(FITTED, 2 * HALF)
    pq.write_table(rows, folder / "live.parquet")
    fit(
        regressor().model,
        folder / "fit.parquet",
        folder / "bundle",
        FitOptions(task="regression", tolerance=0.5),
        name="diamonds",
        columns=COLUMNS,
        cache_dir=folder / "cache",
    )
    asked = rows.select(list(INPUTS)).to_pylist()
    y = rows[TARGET].to_pylist()
    with Server(folder / "bundle", folder / "server", threads=2) as server:
        answers: dict[str, list[dict[str, Any]]] = {}
        counts = {}
        for i, (level, alpha) in enumerate(LEVELS.items()):
            answers[level] = []
            for start in range(i * HALF, (i + 1) * HALF, BATCH):
                body = {"rows": asked[start : start + BATCH], "id": f"live-{start}"}
                # The first level is the bundle's default, so it need not be asked for.
                answers[level] += server.predict(body if i == 0 else {**body, "alpha": alpha})
            given = y[i * HALF : (i + 1) * HALF]
            labels = {a["id"]: v for a, v in zip(answers[level], given, strict=True)}
            counts[level] = server.label(labels)
            counts[f"{level} again"] = server.label(labels)
        counts["conflict"] = server.label({answers["0.9"][0]["id"]: 0.0})
        metrics = counters(server, 2 * HALF)
        summary = json.loads(server.request("/v1/calibration"))
        far = [{k: 3 * v for k, v in row.items()} for row in asked[:HALF]]
        strange = [
            a
            for start in range(0, HALF, BATCH)
            for a in server.predict({"rows": far[start : start + BATCH], "id": f"far-{start}"})
        ]
    return Walk(
        folder / "bundle", folder / "live.parquet", rows, answers, strange, counts, metrics, summary
    )


def counters(server: Server, labelled: int) -> dict[tuple[str, str], float]:
    """(sample, level or bin) -> value, once ``labelled`` labels have reached the counters."""
    deadline = time.monotonic() + 60
    while True:
        found = {
            (s.name, s.labels.get("level", s.labels.get("bin", ""))): s.value
            for family in text_string_to_metric_families(server.request("/metrics").decode())
            for s in family.samples
            if s.name.startswith("uq_") and "le" not in s.labels
        }
        if found.get(("uq_labeled_predictions_total", "all"), 0) >= labelled:
            return found
        assert time.monotonic() < deadline, "the labels did not reach the counters"
        time.sleep(0.05)


def column(answers: list[dict[str, Any]], name: str) -> np.ndarray:
    """A field of friendly answers as the graph's float32."""
    return np.asarray([a[name] for a in answers], np.float32)


def targets(walk: Walk, level: str) -> np.ndarray:
    """The labels of the rows that were asked at a level."""
    at = list(LEVELS).index(level) * HALF
    return walk.rows[TARGET].to_numpy()[at : at + HALF].astype(np.float64)


def test_answers_are_the_graphs(walk: Walk) -> None:
    """By column name over HTTP, bit for bit what the fused graph gives at the same batch shape."""
    predictor = Predictor(walk.bundle, threads=2)
    x = np.stack([walk.rows[c].to_numpy() for c in INPUTS], 1)
    for i, (level, alpha) in enumerate(LEVELS.items()):
        for start in range(0, HALF, BATCH):
            at = i * HALF + start
            want = predictor.run({"features": x[at : at + BATCH]}, q_hat=predictor.q_hat(alpha))
            got = walk.answers[level][start : start + BATCH]
            for name in (*BARS, "ood_score", "ood_pvalue"):
                np.testing.assert_array_equal(column(got, name), want[name].reshape(BATCH))
            for name in ("ood", "abstain"):
                assert [a[name] for a in got] == want[name].tolist()
            quantiles = np.asarray([list(a["quantiles"].values()) for a in got], np.float32)
            np.testing.assert_array_equal(quantiles, want["quantiles"][:, 0])
            assert list(got[0]["quantiles"]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]


def test_the_mean_is_the_frozen_models(walk: Walk) -> None:
    from posthoc.runtime import open_session

    x = np.stack([walk.rows[c].to_numpy() for c in INPUTS], 1)[:BATCH]
    session = open_session(regressor().model.read_bytes(), threads=2)
    (own,) = session.run(None, {"features": x})
    np.testing.assert_array_equal(column(walk.answers["0.9"][:BATCH], "mean"), own[:, 0])


def test_error_bars_add_up_and_bounds_are_around_the_mean(walk: Walk) -> None:
    for answers in walk.answers.values():
        f = {name: column(answers, name).astype(np.float64) for name in BARS}
        total = f["aleatoric_std"] ** 2 + f["epistemic_std"] ** 2
        np.testing.assert_allclose(f["std"] ** 2, total, rtol=1e-5)
        np.testing.assert_allclose(f["upper"] + f["lower"], 2 * f["mean"], rtol=1e-5)
    q = [
        ((column(a, "upper") - column(a, "lower")) / column(a, "std")).astype(np.float64) / 2
        for a in walk.answers.values()
    ]
    predictor = Predictor(walk.bundle)
    for found, alpha in zip(q, LEVELS.values(), strict=True):
        np.testing.assert_allclose(found, predictor.q_hat(alpha), rtol=1e-4)


def test_each_label_counts_once(walk: Walk) -> None:
    for level in LEVELS:
        assert sum(walk.counts[level].values()) == HALF and "duplicate" not in walk.counts[level]
        assert walk.counts[f"{level} again"] == {"duplicate": HALF}
    assert walk.counts["conflict"] == {"conflict": 1}
    assert walk.metrics["uq_labeled_predictions_total", "all"] == 2 * HALF


def test_counters_equal_numpy(walk: Walk) -> None:
    crps = 0.0
    for level in LEVELS:
        y, a = targets(walk, level), walk.answers[level]
        low, high = (column(a, n).astype(np.float64) for n in ("lower", "upper"))
        inside = int(((low <= y) & (y <= high)).sum())
        assert walk.metrics["uq_interval_labeled_total", level] == HALF
        assert walk.metrics["uq_interval_covered_total", level] == inside
        width = walk.metrics["uq_interval_width_sum_total", level]
        assert width == pytest.approx((high - low).sum(), rel=1e-9)
        std = column(a, "std").astype(np.float64)
        t = (y - column(a, "mean").astype(np.float64)) / std
        # Gneiting & Raftery 2007, eq. 21.
        each = std * (t * (2 * norm.cdf(t) - 1) + 2 * norm.pdf(t) - 1 / math.sqrt(math.pi))
        crps += float(each.sum())
    assert walk.metrics["uq_crps_sum_total", ""] == pytest.approx(crps, rel=1e-9)
    answered = sum(not a["abstain"] for level in LEVELS for a in walk.answers[level])
    assert 0 < answered <= 2 * HALF
    flagged = sum(a["ood"] for level in LEVELS for a in walk.answers[level])
    assert walk.metrics["uq_ood_total", ""] == flagged


def test_the_ledgers_own_figures_equal_numpy(walk: Walk) -> None:
    (model,) = walk.summary["models"]
    both = [(targets(walk, level), walk.answers[level]) for level in LEVELS]
    error = np.concatenate([y - column(a, "mean").astype(np.float64) for y, a in both])
    assert model["served"] == model["labelled"] == 2 * HALF
    assert model["rmse"] == pytest.approx(math.sqrt((error**2).mean()), rel=1e-9)
    assert model["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-9)
    for level in LEVELS:
        found = model["coverage"][level]
        assert found["covered"] == walk.metrics["uq_interval_covered_total", level]


def test_batch_scores_equal_the_http_answers(walk: Walk, tmp_path: Path) -> None:
    for i, (level, alpha) in enumerate(LEVELS.items()):
        part = tmp_path / f"{level}.parquet"
        pq.write_table(pq.read_table(walk.live).slice(i * HALF, HALF), part)
        out = tmp_path / f"scored-{level}"
        done = score(
            walk.bundle, part, out, alpha=alpha, batch_size=BATCH, threads=2, passthrough=[TARGET]
        )
        assert (done.good, done.errors) == (HALF, 0)
        scored = pa.concat_tables(pq.read_table(p) for p in sorted(out.glob("*.parquet")))
        for name in (*BARS, "ood_score", "ood_pvalue"):
            got = scored[name].to_numpy()
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, column(walk.answers[level], name))
        for name in ("ood", "abstain"):
            assert scored[name].to_pylist() == [a[name] for a in walk.answers[level]]
        np.testing.assert_array_equal(scored[TARGET].to_numpy(), targets(walk, level))


def test_strange_rows_have_wider_error_bars_and_are_flagged(walk: Walk) -> None:
    """Every feature three times as large: no such diamond."""
    clean = walk.answers["0.9"]
    inside, outside = column(clean, "epistemic_std"), column(walk.strange, "epistemic_std")
    assert np.median(outside) > 2 * np.median(inside)
    assert auroc(inside, outside) > 0.95
    noise = column(clean, "aleatoric_std")
    np.testing.assert_array_equal(column(walk.strange, "aleatoric_std"), noise)
    assert np.mean([a["ood"] for a in walk.strange]) > 0.95
    promised = Predictor(walk.bundle).manifest.ood
    assert promised is not None
    assert np.mean([a["ood"] for a in clean]) < promised.alpha + 0.03


def test_fresh_rows_are_covered_inside_the_band(walk: Walk, folder: Path) -> None:
    """9,794 rows of the table that no part of the fit ever met."""
    whole = pq.read_table(regressor().data)
    pq.write_table(whole.slice(FITTED), folder / "fresh.parquet")
    found = evaluate(walk.bundle, folder / "fresh.parquet")
    assert found.n > 9_700
    for level in found.levels:
        assert level.band_low <= level.coverage <= level.band_high
    nll = {s.name: s.metrics["nll"].value for s in found.systems}
    assert nll["hedged"] < nll["constant error bar"] + 0.002


def test_coverage_over_twenty_splits(material: Material) -> None:
    """Residual scores are untied (a few rows occur twice), so both edges of the band count."""
    inside = dict.fromkeys(LEVELS.values(), 0)
    for seed in range(20):
        done, test, _ = fit_material(material, FitOptions(task="regression", seed=seed))
        assert test.y is not None
        out = run_head(done.head, test)
        worst = residual_scores(test.y, out["mean"], out["std"])
        for g in done.conformal.guarantees:
            low, high = coverage_band(g.n, len(test), g.alpha)
            inside[g.alpha] += low <= float((worst <= g.threshold).mean()) <= high
        precision = done.module.settings["prior_precision"]
        assert 1e-6 < precision < 1e6  # a maximum of the evidence, not a bound of the search
        assert done.scaling.strength > 0
    assert min(inside.values()) >= 18, inside
